"""This library as an attention backend of inference engines: a module for each, which imports that engine."""
