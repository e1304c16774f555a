// A GPU for tests: runs the kernels of csrc/cuda/ on the host, one fiber a thread, one block after the other.
//
// Barriers, ballots and shuffles are real: a fiber goes on when all that must have come have come. Who runs next is
// for the scheduler to say: the first that can, the last, or any at random, changing at atomics too; blocks run in the
// same spirit, in any order. So what a barrier does not order happens in different orders. Shared memory begins with
// garbage, a barrier can be left out by its line, and what a GPU would not do either (threads at different barriers, a
// shuffle with lanes missing, memory that is not the kernel's) ends the launch with a message.
#ifndef GCOMPRESS_EMULATOR_H
#define GCOMPRESS_EMULATOR_H

#include <stdint.h>
#include <string.h>

namespace emulator {

struct Index {
    uint32_t x;
};

uint64_t exchange(const char* file, int line, uint32_t mask, uint64_t value, const uint64_t** all);
void barrier(const char* file, int line);
void warp_barrier(const char* file, int line, uint32_t mask);
void at_atomic();
void atomic_begins();  // until it ends, accesses are of one atomic (races.cc)
void atomic_ends();
void* shared_memory(const void* site, uint64_t bytes);
void* dynamic_shared_memory();
uint64_t double_bits(double value);

typedef void (*Caller)(void* kernel, const uint64_t* arguments);
void add_kernel(const char* name, void* kernel, Caller caller, int parameters);

template <class T>
T from_slot(uint64_t slot) {
    static_assert(sizeof(T) == 8, "kernels take parameters of 8 bytes");
    T value;
    memcpy(&value, &slot, 8);
    return value;
}

template <int... numbers>
struct Numbers {};
template <int count, int... rest>
struct Counted : Counted<count - 1, count - 1, rest...> {};
template <int... rest>
struct Counted<0, rest...> {
    typedef Numbers<rest...> type;
};

template <class... Parameters>
struct Kernel {
    template <int... numbers>
    static void call_with(void* kernel, const uint64_t* slots, Numbers<numbers...>) {
        ((void (*)(Parameters...))kernel)(from_slot<Parameters>(slots[numbers])...);
    }
    static void call(void* kernel, const uint64_t* slots) {
        call_with(kernel, slots, typename Counted<sizeof...(Parameters)>::type());
    }
};

struct Registration {
    template <class... Parameters>
    Registration(const char* name, void (*kernel)(Parameters...)) {
        add_kernel(name, (void*)kernel, Kernel<Parameters...>::call, (int)sizeof...(Parameters));
    }
};

template <class T>
T shuffled(const char* file, int line, uint32_t mask, T value, int from) {
    uint64_t slot = 0;
    memcpy(&slot, &value, sizeof value);
    const uint64_t* all;
    exchange(file, line, mask, slot, &all);
    T result;
    memcpy(&result, &all[from], sizeof result);
    return result;
}

}  // namespace emulator

extern emulator::Index threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) float4 {
    float x, y, z, w;
};

#define GC_KERNEL(name) static void name
#define GC_REGISTER(name) static const emulator::Registration registration_of_##name(#name, name);
#define GC_SHARED(Type, name)          \
    static const char site_##name = 0; \
    auto& name = *(Type*)emulator::shared_memory(&site_##name, sizeof(Type))
#define GC_DYNAMIC_SHARED(Type, name) Type* name = (Type*)emulator::dynamic_shared_memory()

#define __syncthreads() emulator::barrier(__FILE__, __LINE__)
#define __syncwarp(mask) emulator::warp_barrier(__FILE__, __LINE__, mask)
#define __ballot_sync(mask, predicate) \
    ((uint32_t)emulator::exchange(__FILE__, __LINE__, mask, (predicate) ? 1 : 0, nullptr))
#define __shfl_sync(...) emulator_shuffle(__FILE__, __LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) emulator_shuffle_down(__FILE__, __LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) emulator_shuffle_up(__FILE__, __LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) emulator_shuffle_xor(__FILE__, __LINE__, __VA_ARGS__)

inline int emulator_lane() { return (int)(threadIdx.x & 31); }
template <class T>
T emulator_shuffle(const char* file, int line, uint32_t mask, T value, int from, int width = 32) {
    return emulator::shuffled(file, line, mask, value, (emulator_lane() & ~(width - 1)) | (from & (width - 1)));
}
template <class T>
T emulator_shuffle_down(const char* file, int line, uint32_t mask, T value, int distance, int width = 32) {
    const int lane = emulator_lane(), from = lane + distance;
    return emulator::shuffled(file, line, mask, value, from / width == lane / width ? from : lane);
}
template <class T>
T emulator_shuffle_up(const char* file, int line, uint32_t mask, T value, int distance, int width = 32) {
    const int lane = emulator_lane(), from = lane - distance;
    return emulator::shuffled(file, line, mask, value, from >= (lane & ~(width - 1)) ? from : lane);
}
template <class T>
T emulator_shuffle_xor(const char* file, int line, uint32_t mask, T value, int distance) {
    return emulator::shuffled(file, line, mask, value, emulator_lane() ^ distance);
}

template <class T>
T atomicAdd(T* target, T value) {
    emulator::at_atomic();
    emulator::atomic_begins();
    const T before = *target;
    *target = before + value;
    emulator::atomic_ends();
    return before;
}
template <class T>
T atomicOr(T* target, T value) {
    emulator::at_atomic();
    emulator::atomic_begins();
    const T before = *target;
    *target = before | value;
    emulator::atomic_ends();
    return before;
}
template <class T>
T atomicMax(T* target, T value) {
    emulator::at_atomic();
    emulator::atomic_begins();
    const T before = *target;
    *target = before > value ? before : value;
    emulator::atomic_ends();
    return before;
}
inline int __popc(uint32_t value) { return __builtin_popcount(value); }
inline int __popcll(uint64_t value) { return __builtin_popcountll(value); }
inline int __ffs(uint32_t value) { return __builtin_ffs((int)value); }
inline int __ffsll(uint64_t value) { return __builtin_ffsll((long long)value); }
inline uint32_t __brev(uint32_t value) {
    uint32_t reversed = 0;
    for (int bit = 0; bit < 32; ++bit) reversed |= (value >> bit & 1) << (31 - bit);
    return reversed;
}
inline int __clz(uint32_t value) { return value ? __builtin_clz(value) : 32; }

#endif
