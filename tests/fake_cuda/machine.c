/* See machine.h. */
#define _GNU_SOURCE
#include "machine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { GUARD_BYTES = 64, GUARD = 0xFD, UNSET = 0xCD, ALIGNMENT = 256, UNSET_BYTES = 1 << 20, DEPTH = 16 };

typedef struct Rule {
    char name[64];
    long nth, times;
    CUresult code;
    bool sticky;
} Rule;

pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
Context contexts[MAX_DEVICES];
int devices, driver_version;
bool enabled, initialized;
Object *objects[KINDS];
Block *allocations, *registrations;
struct Counters counters;

static Block *graveyard; /* freed while a host function ran that may be using it */
static long hosts_running;
static Rule rules[MAX_RULES];
static Api *apis;
static const char *call_log[LOG_LENGTH];
static long logged;
static long delay_us, patience_ms;
static bool held;
static __thread struct {
    Context *context;
    unsigned generation;
} stack[DEPTH];
static __thread int depth;
static __thread Stream *running; /* the stream whose thread this is */

/* Entry and faults. */

static CUresult injected(const char *name, bool *sticky) {
    for (Rule *rule = rules; rule < rules + MAX_RULES; rule++) {
        if (!rule->name[0] || (strcmp(rule->name, name) && strcmp(rule->name, "*"))) continue;
        if (rule->nth > 1) {
            rule->nth--;
            continue;
        }
        CUresult code = rule->code;
        *sticky = rule->sticky;
        if (rule->times > 0 && --rule->times == 0) rule->name[0] = 0;
        return code;
    }
    return OK;
}

CUresult enter(Api *api, enum Need need) {
    pthread_mutex_lock(&lock);
    if (!api->calls++) {
        Api *known = apis;
        while (known && known != api) known = known->next;
        if (!known) {
            api->next = apis;
            apis = api;
        }
    }
    call_log[logged++ % LOG_LENGTH] = api->name;
    counters.calls++;
    bool sticky = false;
    CUresult code = enabled ? injected(api->name, &sticky) : OK;
    Context *context = current();
    if (code != OK) {
        if (sticky && context) context->sticky = code;
        return code;
    }
    if (need >= INITIALIZED && !initialized) return NOT_INITIALIZED;
    if (need == CONTEXT) {
        if (!context) return depth ? CONTEXT_IS_DESTROYED : INVALID_CONTEXT;
        if (context->sticky) return context->sticky;
    }
    return OK;
}

CUresult leave(CUresult result) {
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult misuse(CUresult code) {
    counters.misuses++;
    return code;
}

struct timespec deadline(void) {
    struct timespec limit;
    clock_gettime(CLOCK_REALTIME, &limit);
    limit.tv_sec += patience_ms / 1000;
    limit.tv_nsec += patience_ms % 1000 * 1000000;
    if (limit.tv_nsec >= 1000000000) {
        limit.tv_sec++;
        limit.tv_nsec -= 1000000000;
    }
    return limit;
}

/* Contexts. */

Context *current(void) {
    if (!depth) return NULL;
    Context *context = stack[depth - 1].context;
    return context->alive && context->generation == stack[depth - 1].generation ? context : NULL;
}

CUresult push_current(Context *context) {
    if (depth == DEPTH) return ILLEGAL_STATE;
    stack[depth].context = context;
    stack[depth++].generation = context->generation;
    return OK;
}

Context *pop_current(void) { return depth ? stack[--depth].context : NULL; }

CUresult set_current(Context *context) {
    if (context && !context->alive) return INVALID_CONTEXT;
    pop_current();
    return context ? push_current(context) : OK;
}

void kill_context(Context *context) {
    context->alive = false;
    context->generation++;
    context->sticky = OK;
    context->default_stream = NULL;
    for (int kind = 0; kind < KINDS; kind++)
        for (Object *object = objects[kind], *next; object; object = next) {
            next = object->next;
            if (object->context != context || !object->live) continue;
            if (kind == STREAM)
                destroy_stream((Stream *)object);
            else
                destroy(object);
        }
    for (Block *block = allocations, *next; block; block = next) {
        next = block->next;
        if (block->context == context) release(&allocations, block->start);
    }
    for (Block *block = registrations, *next; block; block = next) {
        next = block->next;
        if (block->context == context) release(&registrations, block->start);
    }
    pthread_cond_broadcast(&changed);
}

/* Objects. */

Object *create(enum Kind kind, size_t bytes, bool hidden) {
    Object *object = calloc(1, bytes);
    object->kind = kind;
    object->references = 1;
    object->live = true;
    object->hidden = hidden;
    object->context = current();
    object->generation = object->context->generation;
    object->next = objects[kind];
    objects[kind] = object;
    if (!hidden) counters.live[kind]++;
    return object;
}

Object *find(enum Kind kind, const void *handle) {
    for (Object *object = objects[kind]; object; object = object->next)
        if (object == handle && object->live) return object;
    counters.misuses++;
    return NULL;
}

static void free_node(Node *node) {
    if (node->event) drop(&node->event->object);
    if (node->exec) drop(&node->exec->object);
    free(node->staged);
    free(node);
}

static void free_list(List *list) {
    for (Node *node = list->first, *next; node; node = next) {
        next = node->next;
        free_node(node);
    }
    list->first = list->last = NULL;
}

void drop(Object *object) {
    if (--object->references) return;
    Object **link = &objects[object->kind];
    while (*link != object) link = &(*link)->next;
    *link = object->next;
    if (object->kind == GRAPH) free_list(&((Graph *)object)->nodes);
    if (object->kind == EXEC) free_list(&((Exec *)object)->nodes);
    if (object->kind == STREAM) pthread_cond_destroy(&((Stream *)object)->arrived);
    free(object);
}

void destroy(Object *object) {
    object->live = false;
    if (!object->hidden) counters.live[object->kind]--;
    drop(object);
}

/* Memory. */

Block *block_of(Block *list, const char *address, size_t bytes) {
    for (Block *block = list; block; block = block->next)
        if (address >= block->start && address + bytes <= block->start + block->bytes) return block;
    return NULL;
}

bool is_device(const char *address, size_t bytes) {
    if (block_of(allocations, address, bytes)) return true;
    Block *mapped = block_of(registrations, address, bytes);
    return mapped && mapped->flags & REGISTER_DEVICEMAP;
}

static void bury(void) {
    for (Block *block = graveyard, *next; block && !hosts_running; block = next) {
        next = graveyard = block->next;
        free(block->start);
        free(block);
    }
}

CUresult allocate(void **address, size_t bytes) {
    Context *context = current();
    if (!bytes) return misuse(INVALID_VALUE);
    if (context->used + bytes > context->memory) return OUT_OF_MEMORY;
    if (posix_memalign(address, ALIGNMENT, bytes + GUARD_BYTES)) return OUT_OF_MEMORY;
    memset(*address, UNSET, bytes < UNSET_BYTES ? bytes : UNSET_BYTES);
    memset((char *)*address + bytes, GUARD, GUARD_BYTES);
    Block *block = calloc(1, sizeof *block);
    *block = (Block){*address, bytes, 0, context, allocations};
    allocations = block;
    context->used += bytes;
    return OK;
}

CUresult release(Block **list, char *address) {
    Block **link = list;
    while (*link && (*link)->start != address) link = &(*link)->next;
    Block *block = *link;
    if (!block) return misuse(list == &registrations ? NOT_REGISTERED : INVALID_VALUE);
    *link = block->next;
    if (list == &registrations) {
        free(block);
        return OK;
    }
    block->context->used -= block->bytes;
    for (int i = 0; i < GUARD_BYTES; i++)
        if ((unsigned char)block->start[block->bytes + i] != GUARD) {
            counters.overruns++;
            break;
        }
    block->next = graveyard;
    graveyard = block;
    bury();
    return OK;
}

/* Work on a stream's thread. */

static void fault(Context *context, CUresult code) {
    if (!context->sticky) context->sticky = code;
    pthread_cond_broadcast(&changed);
}

static void run_copy(Context *context, Node *node) {
    bool in = node->op == COPY_IN, out = node->op == COPY_OUT;
    char *from = node->staged ? node->staged : node->from;
    bool fits = (out || is_device(node->to, node->bytes))
        && (in || node->op == FILL || is_device(node->from, node->bytes))
        && (!node->pinned || block_of(registrations, in ? node->from : node->to, node->bytes));
    if (!fits) {
        counters.misuses++;
        fault(context, ILLEGAL_ADDRESS);
    } else if (node->op == FILL) {
        memset(node->to, node->value, node->bytes);
    } else {
        memmove(node->to, from, node->bytes);
    }
}

static bool is_dead(Stream *stream) {
    Context *context = stream->object.context;
    return context->sticky || context->generation != stream->object.generation;
}

static void run(Stream *stream, Node *node) {
    Context *context = stream->object.context;
    if (node->op == RECORD) {
        if (node->event->completed < node->turn) node->event->completed = node->turn;
        clock_gettime(CLOCK_MONOTONIC, &node->event->at);
        return;
    }
    if (node->op == WAIT) {
        while (node->event->completed < node->turn && !is_dead(stream)) pthread_cond_wait(&changed, &lock);
        return;
    }
    if (node->op == LAUNCH) {
        counters.launches++;
        for (Node *inner = node->exec->nodes.first; inner; inner = inner->next) run(stream, inner);
        return;
    }
    while (held && !is_dead(stream)) pthread_cond_wait(&changed, &lock);
    if (is_dead(stream)) return;
    counters.work++;
    if (delay_us) {
        long pause = delay_us;
        pthread_mutex_unlock(&lock);
        usleep(pause);
        pthread_mutex_lock(&lock);
        if (is_dead(stream)) return;
    }
    bool sticky;
    CUresult code = injected("work", &sticky);
    if (!code) code = injected(node->op == HOST ? "work:host" : "work:copy", &sticky);
    if (code) {
        fault(context, code);
    } else if (node->op == HOST) {
        hosts_running++;
        pthread_mutex_unlock(&lock);
        node->function(node->data);
        pthread_mutex_lock(&lock);
        hosts_running--;
        bury();
    } else {
        run_copy(context, node);
    }
}

static void *stream_main(void *argument) {
    Stream *stream = running = argument;
    pthread_mutex_lock(&lock);
    while (true) {
        while (!stream->queue.first && !stream->quit) pthread_cond_wait(&stream->arrived, &lock);
        Node *node = stream->queue.first;
        if (!node) break;
        run(stream, node);
        stream->queue.first = node->next;
        if (!node->next) stream->queue.last = NULL;
        stream->done++;
        free_node(node);
        pthread_cond_broadcast(&changed);
    }
    drop(&stream->object);
    counters.threads--;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return NULL;
}

Stream *create_stream(bool hidden) {
    Stream *stream = (Stream *)create(STREAM, sizeof *stream, hidden);
    pthread_cond_init(&stream->arrived, NULL);
    stream->object.references++; /* its thread's */
    pthread_t thread;
    if (pthread_create(&thread, NULL, stream_main, stream)) {
        stream->object.references--;
        destroy(&stream->object);
        return NULL;
    }
    pthread_detach(thread);
    counters.threads++;
    return stream;
}

Stream *find_stream(void *handle) {
    if ((uintptr_t)handle > 2) return (Stream *)find(STREAM, handle);
    counters.default_stream_uses++;
    Context *context = current();
    if (!context->default_stream) context->default_stream = create_stream(true);
    return context->default_stream;
}

void destroy_stream(Stream *stream) {
    if (stream->capture) {
        if (stream->capture->origin == stream)
            end_capture(stream->capture);
        else
            stream->capture->broken = true;
        stream->capture = NULL;
    }
    stream->quit = true;
    pthread_cond_signal(&stream->arrived);
    destroy(&stream->object);
}

void append(List *list, Node node) {
    Node *copy = malloc(sizeof *copy);
    *copy = node;
    copy->next = NULL;
    if (list->last)
        list->last->next = copy;
    else
        list->first = copy;
    list->last = copy;
}

void copy_list(List *to, const List *from) {
    for (const Node *node = from->first; node; node = node->next) append(to, *node);
}

CUresult submit(Stream *stream, Node node) {
    Capture *capture = stream->capture;
    if (capture) {
        if (capture->broken) return CAPTURE_INVALIDATED;
        stream->unjoined = stream != capture->origin;
        if (node.op == LAUNCH)
            copy_list(&capture->nodes, &node.exec->nodes);
        else
            append(&capture->nodes, node);
        return OK;
    }
    if (node.event) node.event->object.references++;
    if (node.exec) node.exec->object.references++;
    append(&stream->queue, node);
    stream->queued++;
    pthread_cond_signal(&stream->arrived);
    return OK;
}

CUresult submit_copy(Stream *stream, enum Op op, void *to, const void *from, size_t bytes) {
    Node node = {.op = op, .to = to, .from = (char *)from, .bytes = bytes};
    if ((op != COPY_OUT && !is_device(to, bytes)) || (op != COPY_IN && !is_device(from, bytes)))
        return misuse(INVALID_VALUE);
    if (op == COPY_WITHIN) return submit(stream, node);
    node.pinned = block_of(registrations, op == COPY_IN ? from : to, bytes) != NULL;
    if (node.pinned) return submit(stream, node);
    counters.pageable_copies++;
    if (op == COPY_IN && !stream->capture) {
        node.staged = malloc(bytes);
        memcpy(node.staged, from, bytes);
    }
    CUresult result = submit(stream, node);
    if (result == OK && op == COPY_OUT && !stream->capture) {
        uint64_t target = stream->queued;
        struct timespec limit = deadline();
        stream->object.references++;
        while (stream->done < target && result == OK)
            if (pthread_cond_timedwait(&changed, &lock, &limit)) result = TIMEOUT;
        drop(&stream->object);
    }
    return result;
}

/* Captures. */

CUresult break_capture(Stream *stream, CUresult code) {
    stream->capture->broken = true;
    return misuse(code);
}

/* For calls that a thread may not make while it captures (or, in global mode, that nobody may make). */
CUresult unsafe_call(void) {
    for (Object *object = objects[STREAM]; object; object = object->next) {
        Capture *capture = ((Stream *)object)->capture;
        if (!capture || capture->mode == MODE_RELAXED) continue;
        if (capture->mode == 0 || pthread_equal(capture->thread, pthread_self()))
            return break_capture((Stream *)object, CAPTURE_UNSUPPORTED);
    }
    return OK;
}

void end_capture(Capture *capture) {
    for (Object *object = objects[STREAM]; object; object = object->next)
        if (((Stream *)object)->capture == capture) ((Stream *)object)->capture = NULL;
    free_list(&capture->nodes);
    free(capture);
}

/* Control, for the tests. */

static void configure(int ordinal) {
    Context *device = &contexts[ordinal];
    unsigned generation = device->generation;
    *device = (Context){.major = 8, .minor = 7, .memory = (size_t)8 << 30, .generation = generation + 1};
    snprintf(device->name, sizeof device->name, "Fake GPU %d", ordinal);
}

/* Destroys everything and restores the defaults. Returns how many threads could not be ended. */
int fake_cuda_reset(int enable) {
    pthread_mutex_lock(&lock);
    held = false;
    memset(rules, 0, sizeof rules);
    for (int i = 0; i < MAX_DEVICES; i++) kill_context(&contexts[i]);
    struct timespec limit = deadline();
    while (counters.threads && !pthread_cond_timedwait(&changed, &lock, &limit)) {
    }
    int threads = (int)counters.threads;
    memset(&counters, 0, sizeof counters);
    counters.threads = threads;
    for (int i = 0; i < MAX_DEVICES; i++) configure(i);
    for (Api *api = apis; api; api = api->next) api->calls = 0;
    logged = 0;
    devices = 1;
    driver_version = 12060;
    delay_us = 0;
    patience_ms = 20000;
    initialized = false;
    enabled = enable;
    pthread_mutex_unlock(&lock);
    return threads;
}

/* Without the variable it is a driver without a GPU, which disturbs nobody else in the process. */
__attribute__((constructor)) static void start(void) { fake_cuda_reset(getenv("FAKE_CUDA") != NULL); }

long fake_cuda_count(const char *name) {
    pthread_mutex_lock(&lock);
    long value = -1;
    struct {
        const char *name;
        long value;
    } plain[] = {
        {"streams", counters.live[STREAM]},
        {"events", counters.live[EVENT]},
        {"graphs", counters.live[GRAPH]},
        {"execs", counters.live[EXEC]},
        {"allocations", 0},
        {"registrations", 0},
        {"contexts", 0},
        {"bytes", 0},
        {"threads", counters.threads},
        {"calls", counters.calls},
        {"work", counters.work},
        {"launches", counters.launches},
        {"pageable_copies", counters.pageable_copies},
        {"misuses", counters.misuses},
        {"overruns", counters.overruns},
        {"default_stream_uses", counters.default_stream_uses},
    };
    for (Block *block = allocations; block; block = block->next) plain[4].value++;
    for (Block *block = registrations; block; block = block->next) plain[5].value++;
    for (int i = 0; i < MAX_DEVICES; i++) {
        plain[6].value += contexts[i].retained;
        plain[7].value += (long)contexts[i].used;
    }
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++)
        if (!strcmp(plain[i].name, name)) value = plain[i].value;
    for (Api *api = apis; api; api = api->next)
        if (!strcmp(api->name, name)) value = value < 0 ? api->calls : value + api->calls;
    if (value < 0 && !strncmp(name, "cu", 2)) value = 0;
    pthread_mutex_unlock(&lock);
    return value;
}

/* From the nth call of the function on (1 is the next), `times` calls fail (-1: all). 0: no room for it. */
int fake_cuda_fail(const char *name, long nth, CUresult code, int sticky, long times) {
    pthread_mutex_lock(&lock);
    Rule *rule = rules;
    while (rule < rules + MAX_RULES && rule->name[0]) rule++;
    bool fits = rule < rules + MAX_RULES && strlen(name) < sizeof rule->name;
    if (fits) {
        *rule = (Rule){.nth = nth, .times = times, .code = code, .sticky = sticky};
        strcpy(rule->name, name);
    }
    pthread_mutex_unlock(&lock);
    return fits;
}

void fake_cuda_heal(void) {
    pthread_mutex_lock(&lock);
    memset(rules, 0, sizeof rules);
    pthread_mutex_unlock(&lock);
}

/* For a host function that plays a kernel: the kernel failed. */
void fake_cuda_fault(CUresult code) {
    pthread_mutex_lock(&lock);
    if (running && !is_dead(running)) fault(running->object.context, code);
    pthread_mutex_unlock(&lock);
}

void fake_cuda_hold(int hold) {
    pthread_mutex_lock(&lock);
    held = hold;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

void fake_cuda_set(const char *name, long value) {
    pthread_mutex_lock(&lock);
    if (!strcmp(name, "delay_us")) delay_us = value;
    if (!strcmp(name, "patience_ms")) patience_ms = value;
    if (!strcmp(name, "devices")) devices = (int)value;
    if (!strcmp(name, "driver_version")) driver_version = (int)value;
    pthread_mutex_unlock(&lock);
}

void fake_cuda_set_device(int ordinal, const char *name, int major, int minor, int integrated, size_t memory) {
    pthread_mutex_lock(&lock);
    Context *device = &contexts[ordinal];
    snprintf(device->name, sizeof device->name, "%s", name);
    device->major = major;
    device->minor = minor;
    device->integrated = integrated;
    device->memory = memory;
    pthread_mutex_unlock(&lock);
}

int fake_cuda_is_device(void *address, size_t bytes) {
    pthread_mutex_lock(&lock);
    int found = is_device(address, bytes);
    pthread_mutex_unlock(&lock);
    return found;
}

void fake_cuda_clear_log(void) {
    pthread_mutex_lock(&lock);
    logged = 0;
    pthread_mutex_unlock(&lock);
}

/* The names of the latest calls, oldest first, one per line. Returns the length that it needs. */
size_t fake_cuda_log(char *text, size_t room) {
    pthread_mutex_lock(&lock);
    size_t length = 0;
    for (long i = logged > LOG_LENGTH ? logged - LOG_LENGTH : 0; i < logged; i++) {
        const char *name = call_log[i % LOG_LENGTH];
        size_t bytes = strlen(name);
        if (length + bytes + 2 <= room) {
            memcpy(text + length, name, bytes);
            text[length + bytes] = '\n';
        }
        length += bytes + 1;
    }
    if (room) text[length < room ? length : room - 1] = 0;
    pthread_mutex_unlock(&lock);
    return length + 1;
}
