/* A CUDA driver and the DSL's runtime library with no GPU behind them: one shared object that serves as libcuda.so.1
 * (cuda.bindings) and as libcute_dsl_runtime.so (compiled host code). It runs nothing; it records what would be run.
 *
 * Two Hopper devices and one that is not. A stream of device d has a handle from (d + 1) << 32 on, and the context of
 * device d is the address of contexts[d], whose id changes when it is reset. Every result that a test may want to
 * change is a global variable. `num_broken` counts the calls that would have ended a capture.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <string.h>

enum { DEVICES = 3, ALLOCATIONS = 64, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, NOT_FOUND = 500, NOT_READY = 600 };
enum { RELAXED = 2, GRAPHS = 4096 };
enum { CLUSTER_DIMENSION = 4, PROGRAMMATIC_STREAM_SERIALIZATION = 6 };     /* cudaLaunchAttributeID */

int init_result = 0, capture_result = 0, capture_state = 0, load_result = 0, launch_result = 0;
int memory_result = 0, event_result = 0;
int stream_generation = 1;                                                  /* another one: all streams are new */
int num_broken = 0, num_events = 0;
uint64_t context_ids[DEVICES] = {1001, 1002, 1003};
uint64_t capture_stream[DEVICES] = {0};                                     /* the first; 0: every stream captures */
int capture_id = 1;                                                         /* and the graph's number */
static __thread int capture_mode = 0;
int cuStreamIsCapturing(void *stream, int *state);
static void unsafe(void) { num_broken += capture_state && capture_mode != RELAXED; }
static void waits(void) { num_broken += capture_state != 0; }
int major_of[DEVICES] = {9, 9, 8}, sms_of[DEVICES] = {132, 114, 108};
typedef struct { uint64_t address, bytes, cleared; } allocation;
allocation allocations[ALLOCATIONS];
int num_allocations = 0, num_freed = 0;
static uint64_t used_bytes[DEVICES];
static char contexts[DEVICES];
static __thread char *stack[8] = {0};
static __thread int depth = 0;

/* ---- libcuda ---- */
static int device_of(const void *stream) { return (int)((uintptr_t)stream >> 32) - 1; }
int current_device(void) { return stack[depth] ? (int)(stack[depth] - contexts) : -1; }

int cuInit(unsigned flags) { return init_result; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuCtxGetDevice(int *device) { *device = current_device(); return *device < 0 ? INVALID_CONTEXT : 0; }
int cuCtxSetCurrent(void *context) { stack[depth] = context; return 0; }
int cuCtxPushCurrent_v2(void *context) { stack[++depth] = context; return 0; }
int cuCtxPopCurrent_v2(void **context) { *context = stack[depth--]; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = contexts + device; return 0; }
int cuCtxGetCurrent(void **context) { *context = stack[depth]; return 0; }
int cuCtxGetId(void *context, uint64_t *id) {
    int device = context ? (int)((char *)context - contexts) : current_device();
    if (device < 0) return INVALID_CONTEXT;
    *id = context_ids[device];
    return 0;
}
int cuThreadExchangeStreamCaptureMode(int *mode) {
    int before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return 0;
}
int cuStreamGetCtx(void *stream, void **context) { *context = contexts + device_of(stream); return 0; }
int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    int device = current_device();
    unsafe();
    if (memory_result) return memory_result;
    if (num_allocations == ALLOCATIONS) return OUT_OF_MEMORY;
    *address = 0x500012300000 + ((uint64_t)device << 32) + used_bytes[device];      /* no half of it is a small int */
    used_bytes[device] += (bytes + 255) / 256 * 256;
    allocations[num_allocations++] = (allocation){*address, bytes, 0};
    return 0;
}
int cuMemFree_v2(uint64_t address) { num_freed++; return 0; }
int cuStreamCreate(void **stream, unsigned flags) { unsafe(); *stream = (void *)-1; return 0; }
int cuStreamSynchronize(void *stream) { unsafe(); return 0; }
int cuStreamDestroy_v2(void *stream) { return 0; }
int cuMemsetD8Async(uint64_t address, unsigned char value, size_t count, void *stream) {
    for (int i = 0; i < num_allocations; i++)
        if (allocations[i].address == address && value == 0) allocations[i].cleared = count;
    return 0;
}
int cuMemsetD8_v2(uint64_t address, unsigned char value, size_t count) {
    waits();
    return cuMemsetD8Async(address, value, count, 0);
}
int cuCtxSynchronize(void) { waits(); return 0; }
int cuEventCreate(void **event, unsigned flags) { *event = (void *)(uintptr_t)++num_events; return 0; }
int cuEventRecord(void *event, void *stream) { return 0; }
int cuEventQuery(void *event) { unsafe(); return event_result; }
int cuEventDestroy_v2(void *event) { return 0; }
int cuStreamGetId(void *stream, uint64_t *id) {                /* in a capture, it would end that */
    int state;
    cuStreamIsCapturing(stream, &state);
    num_broken += state != 0;
    *id = ((uint64_t)stream_generation << 48) + (uintptr_t)stream;
    return 0;
}
int cuStreamIsCapturing(void *stream, int *state) {
    *state = !*capture_stream || *capture_stream == (uintptr_t)stream ? capture_state : 0;
    return capture_result;
}
int cuStreamGetCaptureInfo(void *stream, int *state, uint64_t *id, void **graph, void *nodes, void *edges, size_t *n) {
    *state = capture_state;
    *id = capture_id;
    *graph = (void *)(uintptr_t)capture_id;
    if (n) *n = 0;
    return 0;
}
typedef struct { void (*destroy)(void *); void *argument; } user_object;
static user_object objects[GRAPHS], of_graphs[GRAPHS];
static int num_objects = 0;
int cuUserObjectCreate(void **object, void *argument, void (*destroy)(void *), unsigned count, unsigned flags) {
    objects[num_objects] = (user_object){destroy, argument};
    *object = objects + num_objects++;
    return 0;
}
int cuGraphRetainUserObject(void *graph, user_object *object, unsigned count, unsigned flags) {
    of_graphs[(uintptr_t)graph] = *object;
    return 0;
}
void end_graph(int graph) { of_graphs[graph].destroy(of_graphs[graph].argument); }
int cuGetErrorName(int code, const char **text) { *text = "CUDA_ERROR_FAKE"; return 0; }
int cuGetErrorString(int code, const char **text) { *text = "a fake error"; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? major_of[device] : attribute == 76 ? 0 : attribute == 16 ? sms_of[device] : 0;
    return 0;
}
int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    char versioned[128];
    strncpy(versioned, name, 120);
    versioned[120] = 0;
    void *found = dlsym(RTLD_DEFAULT, strcat(versioned, "_v2"));
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    if (library && !(found = dlsym(library, versioned))) found = dlsym(library, name);
    *function = found;
    if (status) *status = found ? 0 : 1;
    return found ? 0 : NOT_FOUND;
}

/* ---- the DSL's runtime library ---- */
typedef struct { unsigned x, y, z; } dim3;
typedef struct { int id, padding; union { dim3 cluster; int number; char bytes[64]; } value; } launch_attribute;
typedef struct {
    dim3 grid, block;
    size_t smem;
    void *stream;
    const launch_attribute *attributes;
    unsigned num_attributes;
} launch_config;

/* Of a launch without the attribute, cluster and may_start_early are 0. */
struct {
    dim3 grid, block;
    uint64_t smem;
    void *stream;
    long count;
    int device;
    const void *kernel;
    dim3 cluster;
    int may_start_early;
} last;
int num_libraries = 0, loaded_on[DEVICES] = {0};
int num_parameters = 0, offsets[128], sizes[128];        /* set by the test, from the cubin */
unsigned char parameters[8192];

int _cudaLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned n, void *c, void *d, unsigned m) {
    *library = (void *)(uintptr_t)++num_libraries;
    return load_result;
}
int _cudaLibraryGetKernel(void **kernel, void *library, const char *name) { *kernel = library; return 0; }
int _cudaLibraryUnload(void *library) { return 0; }
int _cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) { *value = 0; return 0; }
int _cudaDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 97 ? 232448 : 0; return 0; }
int _cudaGetDevice(int *device) { *device = current_device(); return 0; }
int _cudaFuncSetAttribute(const void *kernel, int attribute, int value) { return 0; }
int _cudaKernelSetAttributeForDevice(void *kernel, int attribute, int value, int device) {
    loaded_on[device]++;
    return 0;
}
int _cudaLaunchKernelEx(const launch_config *config, const void *kernel, void **arguments) {
    last.grid = config->grid;
    last.block = config->block;
    last.smem = config->smem;
    last.stream = config->stream;
    last.device = current_device();
    last.kernel = kernel;
    last.count++;
    last.cluster = (dim3){0, 0, 0};
    last.may_start_early = 0;
    for (unsigned i = 0; i < config->num_attributes; i++) {
        const launch_attribute *attribute = config->attributes + i;
        if (attribute->id == CLUSTER_DIMENSION) last.cluster = attribute->value.cluster;
        if (attribute->id == PROGRAMMATIC_STREAM_SERIALIZATION) last.may_start_early = attribute->value.number;
    }
    for (int i = 0; i < num_parameters; i++) memcpy(parameters + offsets[i], arguments[i], sizes[i]);
    return launch_result;
}
