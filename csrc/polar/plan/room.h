// Polar's plan: the memory that the caller hands over, given out piece by piece. Nothing is given back but by going back
// to an earlier state, which is a copy of the Room.
#ifndef GCOMPRESS_POLAR_PLAN_ROOM_H
#define GCOMPRESS_POLAR_PLAN_ROOM_H

#include "../../cpu/simd.h"

namespace {

struct Room {
    uintptr_t at, end;

    // Room for `count` of a type, at a multiple of 64 bytes. It may lie behind the end: see `full`.
    template <class T>
    T* take(int64_t count) {
        const uintptr_t place = (at + 63) & ~(uintptr_t)63;
        at = place + (uintptr_t)count * sizeof(T) + 64;  // vectors may be read a little beyond
        return (T*)place;
    }
    // Whether more was taken than there is: nothing that was taken may then be touched.
    bool full() const { return at > end; }
};

inline Room room_of(uint32_t* memory, int64_t words) { return {(uintptr_t)memory, (uintptr_t)(memory + words)}; }

}  // namespace
#endif
