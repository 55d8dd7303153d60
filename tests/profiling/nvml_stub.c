/* A stand-in for the NVIDIA driver's libnvidia-ml.so.1: two GPUs of 80 GiB, of which processes use 3
 * and the driver 1. Built with WITHOUT_V2 it is a driver before 510; with LOST it reports a lost GPU. */
#include <string.h>

#define GIB (1ULL << 30)
#define SUCCESS 0
#define INVALID_ARGUMENT 2
#define INSUFFICIENT_SIZE 7
#define GPU_IS_LOST 15

typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
} process;

int nvmlInitWithFlags(unsigned flags) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int code)
{
    return code == GPU_IS_LOST ? "GPU is lost" : "Invalid Argument";
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    *count = 2;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device)
{
    if (index > 1)
        return INVALID_ARGUMENT;
    *device = (void *)(unsigned long)(index + 1);
    return SUCCESS;
}

int nvmlDeviceGetUUID(void *device, char *text, unsigned length)
{
    strncpy(text, device == (void *)1 ? "GPU-00000000-stub" : "GPU-11111111-stub", length);
    return SUCCESS;
}

int nvmlDeviceGetName(void *device, char *text, unsigned length)
{
    strncpy(text, "Stub GPU", length);
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *device, memory_v1 *memory)
{
    *memory = (memory_v1){.total = 80 * GIB, .free = 76 * GIB, .used = 4 * GIB};
    return SUCCESS;
}

#ifndef WITHOUT_V2
int nvmlDeviceGetMemoryInfo_v2(void *device, memory_v2 *memory)
{
#ifdef LOST
    return GPU_IS_LOST;
#endif
    memory->total = 80 * GIB;
    memory->reserved = GIB;
    memory->free = 76 * GIB;
    memory->used = 3 * GIB;
    return SUCCESS;
}
#endif

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, process *out)
{
    if (*count < 2) {
        *count = 2;
        return INSUFFICIENT_SIZE;
    }
    *count = 2;
    out[0] = (process){.pid = 41, .used = 2 * GIB};
    out[1] = (process){.pid = 42, .used = ~0ULL};
    return SUCCESS;
}
