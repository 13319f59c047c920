/* A libcuda.so.1 without a GPU, for tests: the functions that cuda.bindings and pycuda call for edgead.
 *
 * Device memory is malloc, a copy is memcpy, a stream is a thread, and a "kernel" is a host function. What the
 * real driver refuses is refused here with the same code; where the real one is vague, this one is strict.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "machine.h"

/* Errors. */

static const struct {
    CUresult code;
    const char *name, *text;
} errors[] = {
#define ERROR(code, name, text) {code, "CUDA_" name, text},
#include "symbols.h"
#undef ERROR
};

static CUresult describe(CUresult code, const char **text, bool name) {
    /* The real driver sets NULL for an unknown code; pycuda dereferences it. */
    *text = name ? "CUDA_ERROR_UNRECOGNIZED" : "unrecognized error code";
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) {
            *text = name ? errors[i].name : errors[i].text;
            return OK;
        }
    return INVALID_VALUE;
}

CUresult cuGetErrorName(CUresult code, const char **text) { return describe(code, text, true); }
CUresult cuGetErrorString(CUresult code, const char **text) { return describe(code, text, false); }

/* Driver and devices. */

CUresult cuInit(unsigned flags) {
    (void)flags;
    ENTER("cuInit", NOTHING);
    if (!enabled || !devices) return leave(NO_DEVICE);
    initialized = true;
    return leave(OK);
}

CUresult cuDriverGetVersion(int *version) {
    ENTER("cuDriverGetVersion", NOTHING);
    *version = enabled ? driver_version : 0;
    return leave(OK);
}

CUresult cuDeviceGetCount(int *count) {
    ENTER("cuDeviceGetCount", INITIALIZED);
    *count = devices;
    return leave(OK);
}

CUresult cuDeviceGet(int *device, int ordinal) {
    ENTER("cuDeviceGet", INITIALIZED);
    if (ordinal < 0 || ordinal >= devices) return leave(INVALID_DEVICE);
    *device = ordinal;
    return leave(OK);
}

CUresult cuDeviceGetName(char *name, int room, int device) {
    ENTER("cuDeviceGetName", INITIALIZED);
    if (device < 0 || device >= devices) return leave(INVALID_DEVICE);
    snprintf(name, room, "%s", contexts[device].name);
    return leave(OK);
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, int device) {
    ENTER("cuDeviceTotalMem", INITIALIZED);
    if (device < 0 || device >= devices) return leave(INVALID_DEVICE);
    *bytes = contexts[device].memory;
    return leave(OK);
}

CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    ENTER("cuDeviceGetAttribute", INITIALIZED);
    if (device < 0 || device >= devices) return leave(INVALID_DEVICE);
    switch (attribute) {
        case 18: *value = contexts[device].integrated; break;
        case 19: /* can map host memory */
        case 41: /* unified addressing */
        case 99: *value = 1; break; /* can register host memory */
        case 75: *value = contexts[device].major; break;
        case 76: *value = contexts[device].minor; break;
        default: *value = 0;
    }
    return leave(OK);
}

CUresult cuDeviceComputeCapability(int *major, int *minor, int device) {
    ENTER("cuDeviceComputeCapability", INITIALIZED);
    if (device < 0 || device >= devices) return leave(INVALID_DEVICE);
    *major = contexts[device].major;
    *minor = contexts[device].minor;
    return leave(OK);
}

/* Contexts. */

CUresult cuDevicePrimaryCtxRetain(void **context, int device) {
    ENTER("cuDevicePrimaryCtxRetain", INITIALIZED);
    if (device < 0 || device >= devices) return leave(INVALID_DEVICE);
    contexts[device].retained++;
    contexts[device].alive = true;
    *context = &contexts[device];
    return leave(OK);
}

CUresult cuDevicePrimaryCtxRelease_v2(int device) {
    ENTER("cuDevicePrimaryCtxRelease", INITIALIZED);
    if (device < 0 || device >= devices) return leave(INVALID_DEVICE);
    if (!contexts[device].retained) return leave(misuse(INVALID_CONTEXT));
    if (!--contexts[device].retained) kill_context(&contexts[device]);
    return leave(OK);
}

CUresult cuDevicePrimaryCtxReset_v2(int device) {
    ENTER("cuDevicePrimaryCtxReset", INITIALIZED);
    if (device < 0 || device >= devices) return leave(INVALID_DEVICE);
    kill_context(&contexts[device]);
    return leave(OK);
}

CUresult cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    ENTER("cuDevicePrimaryCtxGetState", INITIALIZED);
    if (device < 0 || device >= devices) return leave(INVALID_DEVICE);
    *flags = 0;
    *active = contexts[device].alive;
    return leave(OK);
}

static Context *known_context(void *handle) {
    for (int i = 0; i < MAX_DEVICES; i++)
        if (handle == &contexts[i]) return &contexts[i];
    return NULL;
}

CUresult cuCtxSetCurrent(void *handle) {
    ENTER("cuCtxSetCurrent", INITIALIZED);
    if (handle && !known_context(handle)) return leave(misuse(INVALID_CONTEXT));
    return leave(set_current(handle));
}

CUresult cuCtxGetCurrent(void **handle) {
    ENTER("cuCtxGetCurrent", INITIALIZED);
    *handle = current();
    return leave(OK);
}

/* Pushing a dead context and popping work: pycuda does both in destructors, where an error ends the process. */
CUresult cuCtxPushCurrent_v2(void *handle) {
    ENTER("cuCtxPushCurrent", NOTHING);
    if (!known_context(handle)) return leave(misuse(INVALID_CONTEXT));
    return leave(push_current(handle));
}

CUresult cuCtxPopCurrent_v2(void **handle) {
    ENTER("cuCtxPopCurrent", NOTHING);
    Context *context = pop_current();
    if (!context) return leave(INVALID_CONTEXT);
    if (handle) *handle = context;
    return leave(OK);
}

CUresult cuCtxGetDevice(int *device) {
    ENTER("cuCtxGetDevice", CONTEXT);
    *device = (int)(current() - contexts);
    return leave(OK);
}

CUresult cuCtxSynchronize(void) {
    ENTER("cuCtxSynchronize", CONTEXT);
    Context *context = current();
    unsigned generation = context->generation;
    bool busy = true;
    while (busy) {
        busy = false;
        for (Object *object = objects[STREAM]; object && !busy; object = object->next) {
            Stream *stream = (Stream *)object;
            if (object->context != context) continue;
            if (stream->capture) return leave(break_capture(stream, CAPTURE_UNSUPPORTED));
            busy = stream->queue.first != NULL;
        }
        struct timespec limit = deadline();
        if (busy && pthread_cond_timedwait(&changed, &lock, &limit)) return leave(TIMEOUT);
        if (context->generation != generation) return leave(CONTEXT_IS_DESTROYED);
    }
    return leave(context->sticky);
}

CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    ENTER("cuMemGetInfo", CONTEXT);
    *total = current()->memory;
    *free_bytes = *total - current()->used;
    return leave(OK);
}

/* Streams. */

CUresult cuStreamCreate(void **handle, unsigned flags) {
    (void)flags;
    ENTER("cuStreamCreate", CONTEXT);
    *handle = create_stream(false);
    return leave(*handle ? OK : OUT_OF_MEMORY);
}

#define FIND_STREAM(handle) \
    Stream *stream = find_stream(handle); \
    if (!stream) return leave(INVALID_HANDLE)

CUresult cuStreamDestroy_v2(void *handle) {
    ENTER("cuStreamDestroy", CONTEXT);
    Stream *stream = (Stream *)find(STREAM, handle);
    if (!stream) return leave(INVALID_HANDLE);
    destroy_stream(stream);
    return leave(OK);
}

CUresult cuStreamQuery(void *handle) {
    ENTER("cuStreamQuery", CONTEXT);
    FIND_STREAM(handle);
    if (stream->capture) return leave(break_capture(stream, CAPTURE_UNSUPPORTED));
    return leave(stream->queue.first ? NOT_READY : OK);
}

CUresult cuStreamSynchronize(void *handle) {
    ENTER("cuStreamSynchronize", CONTEXT);
    FIND_STREAM(handle);
    CUresult result = stream->capture ? break_capture(stream, CAPTURE_UNSUPPORTED) : unsafe_call();
    if (result) return leave(result);
    Context *context = current();
    uint64_t target = stream->queued;
    struct timespec limit = deadline();
    stream->object.references++;
    while (stream->done < target && result == OK)
        if (pthread_cond_timedwait(&changed, &lock, &limit)) result = TIMEOUT;
    if (result == OK)
        result = context->generation == stream->object.generation ? context->sticky : CONTEXT_IS_DESTROYED;
    drop(&stream->object);
    return leave(result);
}

CUresult cuLaunchHostFunc(void *handle, void (*function)(void *), void *data) {
    ENTER("cuLaunchHostFunc", CONTEXT);
    FIND_STREAM(handle);
    return leave(submit(stream, (Node){.op = HOST, .function = function, .data = data}));
}

/* Events. */

CUresult cuEventCreate(void **handle, unsigned flags) {
    ENTER("cuEventCreate", CONTEXT);
    Event *event = (Event *)create(EVENT, sizeof *event, false);
    event->flags = flags;
    *handle = event;
    return leave(OK);
}

#define FIND_EVENT(name, handle) \
    Event *name = (Event *)find(EVENT, handle); \
    if (!name) return leave(INVALID_HANDLE)

CUresult cuEventDestroy_v2(void *handle) {
    ENTER("cuEventDestroy", CONTEXT);
    FIND_EVENT(event, handle);
    destroy(&event->object);
    return leave(OK);
}

CUresult cuEventRecord(void *handle, void *stream_handle) {
    ENTER("cuEventRecord", CONTEXT);
    FIND_EVENT(event, handle);
    FIND_STREAM(stream_handle);
    if (stream->capture) {
        if (stream->capture->broken) return leave(CAPTURE_INVALIDATED);
        event->capture = stream->capture->number;
        event->captured_on = stream;
        return leave(OK);
    }
    event->capture = 0;
    return leave(submit(stream, (Node){.op = RECORD, .event = event, .turn = ++event->recorded}));
}

static Capture *capture_of(const Event *event) {
    for (Object *object = objects[STREAM]; event->capture && object; object = object->next) {
        Capture *capture = ((Stream *)object)->capture;
        if (capture && capture->number == event->capture) return capture;
    }
    return NULL;
}

CUresult cuEventQuery(void *handle) {
    ENTER("cuEventQuery", CONTEXT);
    FIND_EVENT(event, handle);
    Capture *capture = capture_of(event);
    if (capture) return leave(break_capture(capture->origin, CAPTURED_EVENT));
    return leave(event->completed < event->recorded ? NOT_READY : OK);
}

CUresult cuEventSynchronize(void *handle) {
    ENTER("cuEventSynchronize", CONTEXT);
    FIND_EVENT(event, handle);
    Capture *capture = capture_of(event);
    CUresult result = capture ? break_capture(capture->origin, CAPTURED_EVENT) : unsafe_call();
    if (result) return leave(result);
    Context *context = current();
    uint64_t target = event->recorded;
    struct timespec limit = deadline();
    event->object.references++;
    while (event->completed < target && result == OK)
        if (pthread_cond_timedwait(&changed, &lock, &limit)) result = TIMEOUT;
    if (result == OK)
        result = context->generation == event->object.generation ? context->sticky : CONTEXT_IS_DESTROYED;
    drop(&event->object);
    return leave(result);
}

CUresult cuEventElapsedTime_v2(float *milliseconds, void *from, void *to) {
    ENTER("cuEventElapsedTime", CONTEXT);
    FIND_EVENT(start, from);
    FIND_EVENT(end, to);
    if ((start->flags | end->flags) & EVENT_DISABLE_TIMING || !start->recorded || !end->recorded)
        return leave(misuse(INVALID_HANDLE));
    if (start->completed < start->recorded || end->completed < end->recorded) return leave(NOT_READY);
    *milliseconds = (float)((end->at.tv_sec - start->at.tv_sec) * 1e3 + (end->at.tv_nsec - start->at.tv_nsec) / 1e6);
    return leave(OK);
}

CUresult cuEventElapsedTime(float *milliseconds, void *from, void *to) {
    return cuEventElapsedTime_v2(milliseconds, from, to);
}

CUresult cuStreamWaitEvent(void *handle, void *event_handle, unsigned flags) {
    (void)flags;
    ENTER("cuStreamWaitEvent", CONTEXT);
    FIND_STREAM(handle);
    FIND_EVENT(event, event_handle);
    Capture *capture = capture_of(event);
    if (!capture && stream->capture) return leave(break_capture(stream, CAPTURE_ISOLATION));
    if (!capture) return leave(submit(stream, (Node){.op = WAIT, .event = event, .turn = event->recorded}));
    if (stream->capture && stream->capture != capture) return leave(break_capture(stream, CAPTURE_ISOLATION));
    if (stream != capture->origin) stream->unjoined = true;
    event->captured_on->unjoined = event->captured_on != capture->origin && stream != capture->origin;
    stream->capture = capture;
    return leave(OK);
}

/* Memory. */

#define REFUSE_IN_CAPTURE() \
    do { \
        CUresult refused = unsafe_call(); \
        if (refused) return leave(refused); \
    } while (0)

CUresult cuMemAlloc_v2(void **address, size_t bytes) {
    ENTER("cuMemAlloc", CONTEXT);
    REFUSE_IN_CAPTURE();
    return leave(allocate(address, bytes));
}

CUresult cuMemFree_v2(void *address) {
    ENTER("cuMemFree", CONTEXT);
    REFUSE_IN_CAPTURE();
    return leave(address ? release(&allocations, address) : OK);
}

CUresult cuMemHostRegister_v2(void *address, size_t bytes, unsigned flags) {
    ENTER("cuMemHostRegister", CONTEXT);
    REFUSE_IN_CAPTURE();
    if (!address || !bytes) return leave(misuse(INVALID_VALUE));
    char *start = address;
    for (Block *block = registrations; block; block = block->next)
        if (start < block->start + block->bytes && block->start < start + bytes) return leave(ALREADY_REGISTERED);
    Block *block = calloc(1, sizeof *block);
    *block = (Block){start, bytes, flags, current(), registrations};
    registrations = block;
    return leave(OK);
}

CUresult cuMemHostUnregister(void *address) {
    ENTER("cuMemHostUnregister", CONTEXT);
    REFUSE_IN_CAPTURE();
    return leave(release(&registrations, address));
}

CUresult cuMemHostGetDevicePointer_v2(void **device, void *address, unsigned flags) {
    ENTER("cuMemHostGetDevicePointer", CONTEXT);
    if (flags || !block_of(registrations, address, 1) || !is_device(address, 1)) return leave(misuse(INVALID_VALUE));
    *device = address;
    return leave(OK);
}

#define COPY(name, op, to_type, from_type) \
    CUresult name##Async_v2(to_type to, from_type from, size_t bytes, void *handle) { \
        ENTER(#name "Async", CONTEXT); \
        FIND_STREAM(handle); \
        return leave(submit_copy(stream, op, to, from, bytes)); \
    } \
    CUresult name##_v2(to_type to, from_type from, size_t bytes) { \
        ENTER(#name, CONTEXT); \
        REFUSE_IN_CAPTURE(); \
        if ((op != COPY_OUT && !is_device(to, bytes)) || (op != COPY_IN && !is_device(from, bytes))) \
            return leave(misuse(INVALID_VALUE)); \
        memmove((void *)to, from, bytes); \
        return leave(OK); \
    }
COPY(cuMemcpyHtoD, COPY_IN, void *, const void *)
COPY(cuMemcpyDtoH, COPY_OUT, void *, const void *)
COPY(cuMemcpyDtoD, COPY_WITHIN, void *, const void *)

CUresult cuMemsetD8Async(void *to, unsigned char value, size_t bytes, void *handle) {
    ENTER("cuMemsetD8Async", CONTEXT);
    FIND_STREAM(handle);
    if (!is_device(to, bytes)) return leave(misuse(INVALID_VALUE));
    return leave(submit(stream, (Node){.op = FILL, .to = to, .value = value, .bytes = bytes}));
}

/* Captures and graphs. */

CUresult cuStreamBeginCapture_v2(void *handle, int mode) {
    ENTER("cuStreamBeginCapture", CONTEXT);
    if ((uintptr_t)handle <= 2) return leave(misuse(CAPTURE_UNSUPPORTED));
    FIND_STREAM(handle);
    if (stream->capture) return leave(misuse(ILLEGAL_STATE));
    static uint64_t captures;
    stream->capture = calloc(1, sizeof(Capture));
    *stream->capture = (Capture){.origin = stream, .thread = pthread_self(), .mode = mode, .number = ++captures};
    stream->unjoined = false;
    return leave(OK);
}

CUresult cuStreamIsCapturing(void *handle, int *status) {
    ENTER("cuStreamIsCapturing", CONTEXT);
    FIND_STREAM(handle);
    *status = !stream->capture ? 0 : stream->capture->broken ? 2 : 1;
    return leave(OK);
}

CUresult cuStreamEndCapture(void *handle, void **result) {
    ENTER("cuStreamEndCapture", CONTEXT);
    *result = NULL;
    FIND_STREAM(handle);
    Capture *capture = stream->capture;
    if (!capture) return leave(misuse(ILLEGAL_STATE));
    if (capture->origin != stream) return leave(break_capture(stream, CAPTURE_UNMATCHED));
    if (capture->mode != MODE_RELAXED && !pthread_equal(capture->thread, pthread_self()))
        return leave(misuse(CAPTURE_WRONG_THREAD));
    CUresult code = capture->broken ? CAPTURE_INVALIDATED : OK;
    for (Object *object = objects[STREAM]; object && !code; object = object->next)
        if (((Stream *)object)->capture == capture && ((Stream *)object)->unjoined) code = misuse(CAPTURE_UNJOINED);
    if (!code) {
        Graph *graph = (Graph *)create(GRAPH, sizeof *graph, false);
        graph->nodes = capture->nodes;
        capture->nodes = (List){NULL, NULL};
        *result = graph;
    }
    end_capture(capture);
    return leave(code);
}

CUresult cuGraphInstantiateWithFlags(void **handle, void *graph_handle, unsigned long long flags) {
    (void)flags;
    ENTER("cuGraphInstantiate", CONTEXT);
    Graph *graph = (Graph *)find(GRAPH, graph_handle);
    if (!graph) return leave(INVALID_HANDLE);
    Exec *exec = (Exec *)create(EXEC, sizeof *exec, false);
    copy_list(&exec->nodes, &graph->nodes);
    *handle = exec;
    return leave(OK);
}

CUresult cuGraphLaunch(void *handle, void *stream_handle) {
    ENTER("cuGraphLaunch", CONTEXT);
    Exec *exec = (Exec *)find(EXEC, handle);
    if (!exec) return leave(INVALID_HANDLE);
    FIND_STREAM(stream_handle);
    return leave(submit(stream, (Node){.op = LAUNCH, .exec = exec}));
}

CUresult cuGraphDestroy(void *handle) {
    ENTER("cuGraphDestroy", CONTEXT);
    Object *graph = find(GRAPH, handle);
    if (!graph) return leave(INVALID_HANDLE);
    destroy(graph);
    return leave(OK);
}

CUresult cuGraphExecDestroy(void *handle) {
    ENTER("cuGraphExecDestroy", CONTEXT);
    Object *exec = find(EXEC, handle);
    if (!exec) return leave(INVALID_HANDLE);
    destroy(exec);
    return leave(OK);
}

/* What pycuda links to and edgead never calls. */
#define STUB(name) \
    CUresult name(void) { return NOT_SUPPORTED; }
#include "symbols.h"
#undef STUB

CUresult cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status);
CUresult cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}

/* What cuda.bindings looks up: plain name and the CUDA version from which on it means this function. */
static const struct {
    const char *name;
    int since;
    void *function;
} functions[] = {
#define FUNCTION(name, since, function) {#name, since, (void *)function},
#include "symbols.h"
#undef FUNCTION
};

CUresult cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    (void)flags;
    int best = -1;
    for (int i = 0; i < (int)(sizeof functions / sizeof *functions); i++)
        if (!strcmp(functions[i].name, name) && functions[i].since <= version
            && (best < 0 || functions[i].since > functions[best].since)) {
            best = i;
        }
    *function = best < 0 ? NULL : functions[best].function;
    if (status) *status = best < 0;
    return best < 0 ? NOT_FOUND : OK;
}
