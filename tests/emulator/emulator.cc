// See emulator.h. A C ABI for tests/emulation.py: emulator_launch and the functions around it, at the end.
#include "emulator.h"

#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <string>
#include <sys/mman.h>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

emulator::Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

const int MOST_THREADS = 1024, STACK = 64 << 10, SHARED = 256 << 10, MOST_SHARED = 96 << 10;
enum Order { FIRST = 0, LAST = 1, RANDOM = 2 };

struct KernelEntry {
    void* kernel;
    Caller caller;
    int parameters;
};
std::map<std::string, KernelEntry>& kernels() {
    static std::map<std::string, KernelEntry> all;
    return all;
}

#if defined(__x86_64__)
// Keeps what a called function must keep, and changes stacks.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
typedef void* Place;
#else
typedef ucontext_t Place;
#endif

struct Warp {
    uint32_t arrived, mask;
    uint64_t ballot;
    const char* file;
    int line;
    uint64_t coming[32], result[32];
};

char* stacks = nullptr;
char* shared_bytes = nullptr;
Place places[MOST_THREADS], main_place;
uint64_t runnable[MOST_THREADS / 64];
Warp warps[MOST_THREADS / 32];
int current, threads, alive, waiting;
const char* barrier_file;
int barrier_line;
Order order;
uint64_t random_state;
const KernelEntry* entry;
const uint64_t* arguments;
struct SharedSite {
    const void* site;
    void* place;
} shared_sites[16];
int site_count;
uint64_t shared_used, dynamic_bytes;
sigjmp_buf failed;
char message[512];
uint32_t interval_number;  // of barriers passed, and blocks begun
std::set<std::string> barriers;
std::string left_out;

uint32_t random_word() {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(random_state >> 33);
}

[[noreturn]] void fail(const char* text, const char* file = "", int line = 0) {
    snprintf(message, sizeof message, "%s (block %u, thread %u%s%s:%d)", text, blockIdx.x, threadIdx.x,
             *file ? ", " : "", file, line);
    siglongjmp(failed, 1);
}

std::string place_of(const char* file, int line) {
    const char* base = strrchr(file, '/') ? strrchr(file, '/') + 1 : file;
    return std::string(base) + ":" + std::to_string(line);
}

void set_runnable(int thread, bool on) {
    const uint64_t bit = 1ull << (thread & 63);
    runnable[thread >> 6] = on ? runnable[thread >> 6] | bit : runnable[thread >> 6] & ~bit;
}

void all_runnable() {
    for (int word = 0; word < threads / 64; ++word) runnable[word] = ~0ull;
}

// The next thread in the scheduler's order, or -1.
int next_thread() {
    const int words = (threads + 63) / 64;
    if (order == LAST) {
        for (int word = words - 1; word >= 0; --word)
            if (runnable[word]) return 64 * word + 63 - __builtin_clzll(runnable[word]);
        return -1;
    }
    const int from = order == RANDOM ? (int)(random_word() % (uint32_t)threads) : 0;
    const uint64_t head = runnable[from >> 6] & (~0ull << (from & 63));
    if (head) return (from & ~63) + __builtin_ctzll(head);
    for (int step = 1; step <= words; ++step) {
        const int word = ((from >> 6) + step) % words;
        if (runnable[word]) return 64 * word + __builtin_ctzll(runnable[word]);
    }
    return -1;
}

void to_scheduler() {
#if defined(__x86_64__)
    emulator_switch(&places[current], main_place);
#else
    swapcontext(&places[current], &main_place);
#endif
}

void run_thread() {
    entry->caller(entry->kernel, arguments);
    set_runnable(current, false);
    --alive;
    if (waiting > 0 && waiting == alive)
        fail("threads wait at a barrier that others have passed by ending", barrier_file, barrier_line);
    to_scheduler();
    abort();
}

void prepare_thread(int thread) {
    char* stack = stacks + (int64_t)thread * STACK;
#if defined(__x86_64__)
    void** top = (void**)(stack + STACK - 64);
    *--top = nullptr;  // keeps the stack aligned as behind a call
    *--top = (void*)run_thread;
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    places[thread] = top;
#else
    getcontext(&places[thread]);
    places[thread].uc_stack.ss_sp = stack;
    places[thread].uc_stack.ss_size = STACK;
    places[thread].uc_link = nullptr;
    makecontext(&places[thread], run_thread, 0);
#endif
}

void switch_to(int thread) {
    current = thread;
    threadIdx.x = (uint32_t)thread;
#if defined(__x86_64__)
    emulator_switch(&main_place, places[thread]);
#else
    swapcontext(&main_place, &places[thread]);
#endif
}

void run_block(uint32_t block) {
    blockIdx.x = block;
    alive = threads;
    waiting = 0;
    memset(warps, 0, sizeof warps);
    site_count = 0;
    ++interval_number;
    shared_used = dynamic_bytes;
    memset(shared_bytes, 0xa5, dynamic_bytes);
    for (int thread = 0; thread < threads; ++thread) prepare_thread(thread);
    all_runnable();
    while (alive > 0) {
        const int thread = next_thread();
        if (thread < 0) fail("all threads wait: a barrier or an exchange of lanes is not reached by all");
        switch_to(thread);
    }
}

void on_signal(int number) {
    snprintf(message, sizeof message, "signal %d (%s) in block %u, thread %u", number,
             number == SIGSEGV || number == SIGBUS ? "memory that is not the kernel's"
                                                   : "misaligned, out of range or a shift too far",
             blockIdx.x, threadIdx.x);
    siglongjmp(failed, 1);
}

}  // namespace

void add_kernel(const char* name, void* kernel, Caller caller, int parameters) {
    kernels()[name] = KernelEntry{kernel, caller, parameters};
}

void barrier(const char* file, int line) {
    if (order == FIRST && current == 0) barriers.insert(place_of(file, line));
    if (!left_out.empty() && left_out == place_of(file, line)) return;
    if (waiting > 0 && (barrier_line != line || (barrier_file != file && strcmp(barrier_file, file) != 0)))
        fail("threads of one block wait at different barriers", file, line);
    if (alive < threads) fail("a barrier behind the end of other threads", file, line);
    barrier_file = file;
    barrier_line = line;
    if (++waiting == alive) {
        waiting = 0;
        ++interval_number;
        all_runnable();
    } else {
        set_runnable(current, false);
    }
    to_scheduler();
}

uint64_t exchange(const char* file, int line, uint32_t mask, uint64_t value, const uint64_t** all) {
    Warp& warp = warps[current >> 5];
    const int lane = current & 31;
    if (!(mask >> lane & 1)) fail("a lane that its own mask leaves out", file, line);
    if (warp.arrived && (warp.line != line || warp.mask != mask || (warp.file != file && strcmp(warp.file, file) != 0)))
        fail("lanes of one warp at different exchanges", file, line);
    warp.file = file;
    warp.line = line;
    warp.mask = mask;
    warp.coming[lane] = value;
    warp.arrived |= 1u << lane;
    if (warp.arrived == mask) {
        warp.arrived = 0;
        warp.ballot = 0;
        for (int other = 0; other < 32; ++other) {
            warp.result[other] = mask >> other & 1 ? warp.coming[other] : 0xa5a5a5a5a5a5a5a5ull;
            if (mask >> other & 1) { warp.ballot |= (uint64_t)(warp.coming[other] != 0) << other; }
        }
        runnable[current >> 6] |= (uint64_t)mask << (current & 32);
    } else {
        set_runnable(current, false);
    }
    to_scheduler();
    if (all) *all = warp.result;
    return warp.ballot;
}

void warp_barrier(const char* file, int line, uint32_t mask) { exchange(file, line, mask, 0, nullptr); }

void at_atomic() {
    if (order == RANDOM && (random_word() & 3) == 0) to_scheduler();
}

void* shared_memory(const void* site, uint64_t bytes) {
    for (int number = 0; number < site_count; ++number)
        if (shared_sites[number].site == site) return shared_sites[number].place;
    void* place = shared_bytes + shared_used;
    shared_used += (bytes + 15) / 16 * 16;
    if (shared_used - dynamic_bytes > (48 << 10) || shared_used > MOST_SHARED || site_count == 16)
        fail("more shared memory than sm_70 has");
    shared_sites[site_count].site = site;
    shared_sites[site_count++].place = place;
    memset(place, 0xa5, bytes);
    return place;
}

void* dynamic_shared_memory() { return shared_bytes; }

// For races.cc.
bool in_shared(const void* address, uint64_t* offset) {
    *offset = (uint64_t)((const char*)address - shared_bytes);
    return shared_bytes && *offset < (uint64_t)SHARED;
}
int thread_number() { return current; }
uint32_t interval() { return interval_number; }
void fail_race(uint64_t offset, int other) {
    atomic_ends();
    char text[128];
    snprintf(text, sizeof text, "a race with thread %d at byte %d of shared memory", other, (int)offset);
    fail(text);
}

}  // namespace emulator

using namespace emulator;

extern "C" {

// Runs a kernel; returns NULL, or what went wrong. `schedule`: 0 first thread first, 1 last first, others at random.
const char* emulator_launch(const char* name, int64_t blocks, int block_threads, int64_t dynamic_shared,
                            const uint64_t* slots, int count, int64_t schedule) {
    const auto found = kernels().find(name);
    if (found == kernels().end()) return "no such kernel";
    if (found->second.parameters != count) return "another number of parameters";
    if (!stacks) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        stacks = (char*)mmap(nullptr, (size_t)MOST_THREADS * STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
        shared_bytes = (char*)mmap(nullptr, SHARED, PROT_READ | PROT_WRITE, flags, -1, 0);
        stack_t own = {};
        own.ss_sp = malloc(64 << 10);
        own.ss_size = 64 << 10;
        sigaltstack(&own, nullptr);
    }
    entry = &found->second;
    arguments = slots;
    threads = block_threads;  // a multiple of 64
    dynamic_bytes = (uint64_t)dynamic_shared;
    order = schedule > 1 ? RANDOM : (Order)schedule;
    random_state = (uint64_t)schedule * 0x9E3779B97F4A7C15ull + 1;
    blockDim.x = (uint32_t)block_threads;
    gridDim.x = (uint32_t)blocks;
    memset(runnable, 0, sizeof runnable);
    const int signals[4] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    struct sigaction action = {}, before[4];
    action.sa_handler = on_signal;
    action.sa_flags = SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 4; ++i) sigaction(signals[i], &action, &before[i]);
    const char* volatile result = nullptr;
    if (sigsetjmp(failed, 0) == 0) {
        // Any order of blocks: a step that no number of blocks divides goes through all of them.
        const uint64_t first = order == RANDOM ? random_word() % (uint64_t)blocks : 0;
        for (int64_t i = 0; i < blocks; ++i) {
            const int64_t next = order == LAST ? blocks - 1 - i : (int64_t)((first + (uint64_t)i) % (uint64_t)blocks);
            run_block((uint32_t)next);
        }
    } else {
        result = message;
    }
    for (int i = 0; i < 4; ++i) sigaction(signals[i], &before[i], nullptr);
    return result;
}

int emulator_has(const char* name) { return (int)kernels().count(name); }

const char* emulator_kernels() {
    static std::string all;
    all.clear();
    for (const auto& one : kernels()) all += one.first + "\n";
    return all.c_str();
}

// The barriers that were met since the last call, a line each.
const char* emulator_barriers() {
    static std::string all;
    all.clear();
    for (const std::string& one : barriers) all += one + "\n";
    return all.c_str();
}

// From now on the barrier at "file:line" does nothing; "" puts all back.
void emulator_leave_out(const char* where) { left_out = where; }

// Bytes that end where a page begins which nobody may touch.
void* emulator_allocate(int64_t bytes, int64_t alignment) {
    const int64_t page = 4096, pages = (bytes + alignment + page - 1) / page * page;
    char* start =
        (char*)mmap(nullptr, (size_t)(pages + page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(start + pages, (size_t)page, PROT_NONE);
    return start + (pages - bytes) / alignment * alignment;
}
void emulator_release(void* memory, int64_t bytes, int64_t alignment) {
    const int64_t page = 4096, pages = (bytes + alignment + page - 1) / page * page;
    munmap((void*)((uint64_t)memory / page * page - ((pages - bytes) / alignment * alignment / page * page)),
           (size_t)(pages + page));
}
}
