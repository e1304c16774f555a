// Finds races in shared memory: compiled with -fsanitize=thread, kernels call __tsan_* for every access, and here they
// are (not ThreadSanitizer's, which knows nothing of fibers). Two threads of a block may touch a byte between two
// barriers only if both read it, or both change it by atomics.
#include <stdint.h>
#include <string.h>

#include "emulator.h"

namespace emulator {

// Of emulator.cc.
bool in_shared(const void* address, uint64_t* offset);
int thread_number();
uint32_t interval();  // another one behind each barrier, and for each block
[[noreturn]] void fail_race(uint64_t offset, int other);

namespace {

struct Byte {
    uint32_t written, read, many_read;  // in which interval
    int16_t writer, reader;
    bool by_atomic;
};
Byte bytes[256 << 10];
bool in_atomic;

void touch(const void* address, int size, bool writes) {
    uint64_t offset;
    if (!in_shared(address, &offset)) return;
    const uint32_t now = interval();
    const int own = thread_number();
    for (int i = 0; i < size; ++i) {
        Byte& byte = bytes[offset + (uint64_t)i];
        const bool others_wrote = byte.written == now && byte.writer != own;
        if (others_wrote && !(in_atomic && byte.by_atomic)) fail_race(offset, byte.writer);
        if (writes) {
            if (!in_atomic && byte.read == now && (byte.reader != own || byte.many_read == now))
                fail_race(offset, byte.reader);
            byte.written = now;
            byte.writer = (int16_t)own;
            byte.by_atomic = in_atomic;
        } else if (!in_atomic) {
            if (byte.read == now && byte.reader != own) byte.many_read = now;
            byte.read = now;
            byte.reader = (int16_t)own;
        }
    }
}

}  // namespace

void atomic_begins() { in_atomic = true; }
void atomic_ends() { in_atomic = false; }

}  // namespace emulator

using emulator::touch;

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define GC_ACCESS(size)                                                  \
    void __tsan_read##size(void* p) { touch(p, size, false); }           \
    void __tsan_write##size(void* p) { touch(p, size, true); }           \
    void __tsan_unaligned_read##size(void* p) { touch(p, size, false); } \
    void __tsan_unaligned_write##size(void* p) { touch(p, size, true); } \
    void __tsan_volatile_read##size(void* p) { touch(p, size, false); }  \
    void __tsan_volatile_write##size(void* p) { touch(p, size, true); }
GC_ACCESS(1)
GC_ACCESS(2)
GC_ACCESS(4)
GC_ACCESS(8)
GC_ACCESS(16)
void __tsan_read_range(void* p, unsigned long size) { touch(p, (int)size, false); }
void __tsan_write_range(void* p, unsigned long size) { touch(p, (int)size, true); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
