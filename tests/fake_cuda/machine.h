/* The machine behind the fake driver: contexts, streams with a thread each, memory, captures, faults.
 *
 * Everything is guarded by one mutex. A driver call holds it from ENTER to leave(); a stream's thread gives
 * it up only while a host function runs or while it sleeps.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

typedef int CUresult;
enum {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    CONTEXT_IS_DESTROYED = 709,
    ALREADY_REGISTERED = 712,
    NOT_REGISTERED = 713,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_UNJOINED = 904,
    CAPTURE_ISOLATION = 905,
    CAPTURED_EVENT = 907,
    CAPTURE_WRONG_THREAD = 908,
    TIMEOUT = 909,
};
enum { MAX_DEVICES = 4, MAX_RULES = 32, LOG_LENGTH = 4096 };
enum { MODE_RELAXED = 2, EVENT_DISABLE_TIMING = 2, REGISTER_DEVICEMAP = 2 };

/* One driver function: its plain name, and how often it was called. */
typedef struct Api {
    const char *name;
    long calls;
    struct Api *next;
} Api;

/* The primary context of a device. Its generation changes whenever it dies, so that old uses are noticed. */
typedef struct Context {
    char name[128];
    int major, minor, integrated;
    size_t memory, used;
    int retained;
    bool alive;
    unsigned generation;
    CUresult sticky;
    struct Stream *default_stream;
} Context;

enum Kind { STREAM, EVENT, GRAPH, EXEC, KINDS };

/* What has a handle. It is freed when it was destroyed and nothing in flight refers to it. */
typedef struct Object {
    enum Kind kind;
    int references;
    bool live, hidden;
    Context *context;
    unsigned generation;
    struct Object *next;
} Object;

enum Op { COPY_IN, COPY_OUT, COPY_WITHIN, FILL, HOST, RECORD, WAIT, LAUNCH };

typedef struct Node {
    enum Op op;
    char *to, *from; /* addresses of a copy or a fill */
    size_t bytes;
    bool pinned; /* the host side was registered when the copy was enqueued */
    char *staged; /* snapshot of a source that was not */
    unsigned char value;
    void (*function)(void *);
    void *data;
    struct Event *event;
    uint64_t turn;
    struct Exec *exec;
    struct Node *next;
} Node;

typedef struct List {
    Node *first, *last;
} List;

typedef struct Capture {
    struct Stream *origin;
    pthread_t thread;
    int mode;
    bool broken;
    uint64_t number;
    List nodes;
} Capture;

typedef struct Stream {
    Object object;
    pthread_cond_t arrived;
    List queue;
    uint64_t queued, done;
    bool quit;
    Capture *capture;
    bool unjoined; /* of a capture that began on another stream, and that does not wait for this one */
} Stream;

typedef struct Event {
    Object object;
    unsigned flags;
    uint64_t recorded, completed;
    struct timespec at;
    uint64_t capture; /* number of the capture that it was last recorded in, else 0 */
    Stream *captured_on;
} Event;

typedef struct Graph {
    Object object;
    List nodes;
} Graph;

typedef struct Exec {
    Object object;
    List nodes;
} Exec;

/* A piece of device memory, or of registered host memory. */
typedef struct Block {
    char *start;
    size_t bytes;
    unsigned flags;
    Context *context;
    struct Block *next;
} Block;

extern pthread_mutex_t lock;
extern pthread_cond_t changed;
extern Context contexts[MAX_DEVICES];
extern int devices, driver_version;
extern bool enabled, initialized;
extern Object *objects[KINDS];
extern Block *allocations, *registrations;
extern struct Counters {
    long live[KINDS], threads, calls, work, launches, pageable_copies, misuses, overruns, default_stream_uses;
} counters;

/* What a function needs before it may run. */
enum Need { NOTHING, INITIALIZED, CONTEXT };

CUresult enter(Api *api, enum Need need);
CUresult leave(CUresult result);
#define ENTER(name, need) \
    static Api api = {name, 0, NULL}; \
    CUresult entered = enter(&api, need); \
    if (entered != OK) return leave(entered)

/* When a wait gives up, so that a caller who waits for itself (by holding Python's lock) gets a time-out. */
struct timespec deadline(void);

Context *current(void);
CUresult set_current(Context *context);
CUresult push_current(Context *context);
Context *pop_current(void);

Object *create(enum Kind kind, size_t bytes, bool hidden);
Object *find(enum Kind kind, const void *handle);
void destroy(Object *object);
void drop(Object *object);
Stream *create_stream(bool hidden);
Stream *find_stream(void *handle);
void destroy_stream(Stream *stream);

void append(List *list, Node node);
void copy_list(List *to, const List *from);
CUresult submit(Stream *stream, Node node);
CUresult submit_copy(Stream *stream, enum Op op, void *to, const void *from, size_t bytes);

CUresult unsafe_call(void);
CUresult break_capture(Stream *stream, CUresult code);
void end_capture(Capture *capture);

Block *block_of(Block *list, const char *address, size_t bytes);
bool is_device(const char *address, size_t bytes);
CUresult allocate(void **address, size_t bytes);
CUresult release(Block **list, char *address);
CUresult misuse(CUresult code);
void kill_context(Context *context);
