// What BytePS's CPU path asks of CUDA, without a GPU: host memory is the device's, copies are moves, and streams
// and events have nothing to wait for.
#ifndef GCOMPRESS_STAND_IN_CUDA_RUNTIME_H
#define GCOMPRESS_STAND_IN_CUDA_RUNTIME_H

#include <stddef.h>
#include <string.h>

typedef int cudaError_t;
typedef int cudaMemcpyKind;
typedef void* cudaStream_t;
typedef void* cudaEvent_t;

enum { cudaSuccess = 0, cudaErrorCudartUnloading = 4, cudaErrorNotReady = 600 };
enum { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum { cudaHostRegisterDefault = 0, cudaHostRegisterMapped = 2 };
enum { cudaStreamNonBlocking = 1, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2 };

static inline const char* cudaGetErrorString(cudaError_t) { return "no CUDA in this build"; }
static inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

static inline cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
    memmove(to, from, size);
    return cudaSuccess;
}
static inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind, cudaStream_t) {
    return cudaMemcpy(to, from, size, kind);
}

static inline cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
static inline cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
static inline cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
    *device = host;
    return cudaSuccess;
}

static inline cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = 0;
    return cudaSuccess;
}
static inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    *stream = 0;
    return cudaSuccess;
}
static inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
    return cudaStreamCreateWithFlags(stream, flags);
}
static inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
static inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

static inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = 0;
    return cudaSuccess;
}
static inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
static inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
static inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }

#endif
