// Large tensors by several threads, each with a contiguous share of the entries. Threads are started for a call and end
// with it, so that nothing is kept and a process may fork.
#ifndef GCOMPRESS_CPU_THREADS_H
#define GCOMPRESS_CPU_THREADS_H

#include <pthread.h>

#include "../arith/base.h"

namespace {

const int64_t SHARE_ENTRIES = 1 << 18;  // entries: with fewer, starting a thread takes longer than it saves
const int MOST_THREADS = 64;
const size_t STACK_BYTES = 1 << 20;  // some C libraries give a thread far less

// n entries in shares of `each`, the last one of what is left.
struct Shares {
    int64_t n, each;
    int count;
    int64_t begin(int number) const { return min64(n, number * each); }
};

// Whole units but for the last one's end, and whole blocks of 64 entries, so that no two shares have a byte of codes in
// common.
inline Shares shares_of(int64_t threads, int64_t n, int64_t unit, int64_t least = SHARE_ENTRIES) {
    threads = min64(min64(threads, MOST_THREADS), n / least);
    const int64_t step = unit % 64 ? 64 * unit : unit;
    if (threads < 2 || n <= step) return {n, n, 1};
    const int64_t steps = (n + step - 1) / step, each = (steps + threads - 1) / threads * step;
    return {n, each, (int)((n + each - 1) / each)};
}

template <class Work>
struct Piece {
    const Work* work;
    int number;
    pthread_t thread;
    bool started;
};

template <class Work>
GC_COLD void* do_piece(void* piece) {
    const Piece<Work>* mine = (const Piece<Work>*)piece;
    (*mine->work)(mine->number);
    return 0;
}

// work(0) to work(count - 1) at the same time, for at most MOST_THREADS; what no thread can be had for is done here.
template <class Work>
void at_once(int count, const Work& work) {
    Piece<Work> pieces[MOST_THREADS];
    pthread_attr_t attributes;
    const bool able = count > 1 && pthread_attr_init(&attributes) == 0;
    if (able) pthread_attr_setstacksize(&attributes, STACK_BYTES);
    for (int k = 0; k < count; ++k) {
        Piece<Work>* piece = pieces + k;
        piece->work = &work;
        piece->number = k;
        piece->started = able && k > 0 && pthread_create(&piece->thread, &attributes, do_piece<Work>, piece) == 0;
    }
    if (able) pthread_attr_destroy(&attributes);
    for (int k = 0; k < count; ++k)
        if (!pieces[k].started) do_piece<Work>(pieces + k);
    for (int k = 1; k < count; ++k)
        if (pieces[k].started) pthread_join(pieces[k].thread, 0);
}

// work(number, first, end) for every share.
template <class Work>
void on_shares(const Shares& shares, const Work& work) {
    at_once(shares.count, [&](int number) { work(number, shares.begin(number), shares.begin(number + 1)); });
}

inline void add_to_shared(int64_t* total, int64_t value) {
    if (value) __atomic_fetch_add(total, value, __ATOMIC_RELAXED);
}
inline void set_shared(int32_t* flag) { __atomic_store_n(flag, 1, __ATOMIC_RELAXED); }
// Make the value at `most` at least `value`.
inline void raise_shared(int32_t* most, int32_t value) {
    int32_t seen = __atomic_load_n(most, __ATOMIC_RELAXED);
    while (seen < value && !__atomic_compare_exchange_n(most, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

}  // namespace
#endif
