// NCCL for one local rank, which is all that BytePS's CPU path has: communicators of one rank can be made, and
// collectives, which BytePS runs only among several local ranks, refuse.
#ifndef GCOMPRESS_STAND_IN_NCCL_H
#define GCOMPRESS_STAND_IN_NCCL_H

#include <string.h>

#include "cuda_runtime.h"

typedef void* ncclComm_t;
typedef struct {
    char internal[128];
} ncclUniqueId;
typedef enum { ncclSuccess = 0, ncclInvalidUsage = 5 } ncclResult_t;
typedef enum { ncclInt8, ncclUint8, ncclInt32, ncclUint32, ncclInt64, ncclUint64, ncclFloat16, ncclFloat32, ncclFloat64 } ncclDataType_t;
typedef enum { ncclSum = 0 } ncclRedOp_t;

static inline const char* ncclGetErrorString(ncclResult_t result) {
    return result == ncclSuccess ? "no error" : "this build has no NCCL: one local rank per worker (BYTEPS_LOCAL_SIZE=1)";
}
static inline ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    memset(id, 0, sizeof(*id));
    return ncclSuccess;
}
static inline ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId, int) {
    *comm = 0;
    return ranks == 1 ? ncclSuccess : ncclInvalidUsage;
}
static inline ncclResult_t ncclGroupStart() { return ncclSuccess; }
static inline ncclResult_t ncclGroupEnd() { return ncclSuccess; }

static inline ncclResult_t ncclReduceScatter(const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t,
                                             cudaStream_t) {
    return ncclInvalidUsage;
}
static inline ncclResult_t ncclReduce(const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, int, ncclComm_t,
                                      cudaStream_t) {
    return ncclInvalidUsage;
}
static inline ncclResult_t ncclAllGather(const void*, void*, size_t, ncclDataType_t, ncclComm_t, cudaStream_t) {
    return ncclInvalidUsage;
}
static inline ncclResult_t ncclBroadcast(const void*, void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t) {
    return ncclInvalidUsage;
}

#endif
