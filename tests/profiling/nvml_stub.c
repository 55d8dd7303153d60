/* A stand-in for the NVIDIA driver's libnvidia-ml.so.1: two GPUs of 80 GiB, of which processes use 3
 * and the driver 1. The environment of the process chooses what differs:
 *   <function>=<code>    that function answers with this error code, e.g. nvmlInitWithFlags=9
 *   STUB_FAIL_AFTER=<n>  ... but its first n calls succeed
 *   STUB_ZERO_TOTAL      all sizes are 0
 *   STUB_RAMP            each reading finds 1 GiB more in use than the one before, up to 5 GiB more
 *   STUB_MIXED           the second GPU is another model
 *   STUB_MIG             the first GPU is in MIG mode, with instances of 10 GiB in slots 0 and 2
 *   STUB_MIG_HIDDEN      ... and its own memory is for administrators
 * Built with WITHOUT_V2 it is a driver before 510: no version 2 of the memory question, no version 3
 * of the process question, no MIG. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GIB (1ULL << 30)
#define SUCCESS 0
#define INVALID_ARGUMENT 2
#define NOT_SUPPORTED 3
#define NO_PERMISSION 4
#define NOT_FOUND 6
#define INSUFFICIENT_SIZE 7

typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
} process;

/* A handle is 1 + the GPU's index; a MIG instance's is 100 + its slot. */
#define NUMBER(device) ((unsigned long)(device))
#define IS_INSTANCE(device) (NUMBER(device) >= 100)

#define ANSWER_AS_CHOSEN()                                                          \
    do {                                                                            \
        static int calls;                                                           \
        const char *code = getenv(__func__), *after = getenv("STUB_FAIL_AFTER");    \
        if (code && calls++ >= (after ? atoi(after) : 0))                           \
            return atoi(code);                                                      \
    } while (0)

const char *nvmlErrorString(int code)
{
    return code == 19 ? "In use by another client" : "An error\nof two lines";
}

int nvmlInitWithFlags(unsigned flags)
{
    ANSWER_AS_CHOSEN();
    return SUCCESS;
}

int nvmlShutdown(void) { return SUCCESS; }

int nvmlDeviceGetCount_v2(unsigned *count)
{
    ANSWER_AS_CHOSEN();
    *count = 2;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device)
{
    ANSWER_AS_CHOSEN();
    if (index > 1)
        return INVALID_ARGUMENT;
    *device = (void *)(unsigned long)(index + 1);
    return SUCCESS;
}

int nvmlDeviceGetUUID(void *device, char *text, unsigned length)
{
    if (IS_INSTANCE(device))
        snprintf(text, length, "MIG-%lu-stub", NUMBER(device));
    else
        snprintf(text, length, "GPU-%s-stub", NUMBER(device) == 1 ? "00000000" : "11111111");
    return SUCCESS;
}

int nvmlDeviceGetName(void *device, char *text, unsigned length)
{
    int other = getenv("STUB_MIXED") && NUMBER(device) == 2;
    snprintf(text, length, IS_INSTANCE(device) ? "Stub MIG 1g.10gb" : other ? "Other" : "Stub GPU");
    return SUCCESS;
}

static memory_v2 sizes(void *device)
{
    static int readings;
    memory_v2 memory = {.total = 80 * GIB, .reserved = GIB, .used = 3 * GIB};
    if (IS_INSTANCE(device))
        memory = (memory_v2){.total = 10 * GIB, .reserved = 0, .used = 2 * GIB};
    if (getenv("STUB_RAMP"))
        memory.used += (readings < 5 ? readings++ : 5) * GIB;
    memory.free = memory.total - memory.reserved - memory.used;
    if (getenv("STUB_ZERO_TOTAL"))
        memory = (memory_v2){0};
    return memory;
}

int nvmlDeviceGetMemoryInfo(void *device, memory_v1 *memory)
{
    ANSWER_AS_CHOSEN();
    memory_v2 all = sizes(device);
    *memory = (memory_v1){.total = all.total, .free = all.free, .used = all.used + all.reserved};
    return SUCCESS;
}

static int running(void *device, unsigned *count, process *out)
{
    if (IS_INSTANCE(device)) {
        *count = 0;
        return SUCCESS;
    }
    if (*count < 2) {
        *count = 2;
        return INSUFFICIENT_SIZE;
    }
    *count = 2;
    out[0] = (process){.pid = 41, .used = 2 * GIB};
    out[1] = (process){.pid = 42, .used = ~0ULL};
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v2(void *device, unsigned *count, process *out)
{
    return running(device, count, out);
}

#ifndef WITHOUT_V2
int nvmlDeviceGetMemoryInfo_v2(void *device, memory_v2 *memory)
{
    ANSWER_AS_CHOSEN();
    if (getenv("STUB_MIG_HIDDEN") && NUMBER(device) == 1)
        return NO_PERMISSION;
    unsigned version = memory->version;
    *memory = sizes(device);
    memory->version = version;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, process *out)
{
    ANSWER_AS_CHOSEN();
    return running(device, count, out);
}

int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending)
{
    if (!getenv("STUB_MIG") || NUMBER(device) != 1)
        return NOT_SUPPORTED;
    *current = *pending = 1;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(void *device, unsigned *count)
{
    *count = 7;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(void *device, unsigned index, void **instance)
{
    if (index != 0 && index != 2)
        return NOT_FOUND;
    *instance = (void *)(unsigned long)(100 + index);
    return SUCCESS;
}
#endif
