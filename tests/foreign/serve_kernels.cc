// Runs kernels for another process that may be of another processor: tests/foreign_kernels.py starts this under an
// emulator and sends calls whose pointers are addresses in its own memory. A page that a kernel touches is asked for when
// it does, at the same address; what the kernel changed goes back. For tools/count_instructions.py kernels are run twice: the
// second time all that they touch is there, and this program does nothing else between two system calls.
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../csrc/call.h"

namespace {

const uintptr_t PAGE = 4096;
const int MOST_PAGES = 1 << 16, MOST_WORDS = 32;

struct Page {
    uint8_t *at, *before;
};
Page pages[MOST_PAGES];
int page_count = 0;

void transfer(bool in, void* data, size_t size) {
    uint8_t* at = (uint8_t*)data;
    while (size > 0) {
        const ssize_t done = in ? read(0, at, size) : write(1, at, size);
        if (done <= 0) _exit(in && size == sizeof(int64_t) ? 0 : 3);  // the other side has gone, or is done
        at += done;
        size -= (size_t)done;
    }
}

// A message is three words: what, an address or result, a number of bytes that follow.
void say(int64_t what, int64_t value, int64_t size) {
    int64_t message[3] = {what, value, size};
    transfer(false, message, sizeof message);
}

void fetch(int, siginfo_t* info, void*) {
    uint8_t* at = (uint8_t*)((uintptr_t)info->si_addr & ~(PAGE - 1));
    if ((uintptr_t)at < PAGE || page_count == MOST_PAGES) _exit(4);
    void* page = mmap(at, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (page != at) _exit(5);  // this process has something of its own there
    say('P', (int64_t)at, 0);
    transfer(true, at, PAGE);
    uint8_t* before = (uint8_t*)mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(before, at, PAGE);
    pages[page_count++] = {at, before};
}

// The bytes that changed go back, and no others, which the other process may have changed meanwhile; and the pages go.
void give_back() {
    for (int p = 0; p < page_count; ++p) {
        const Page& page = pages[p];
        for (uintptr_t i = 0; i < PAGE;) {
            const uintptr_t first = i;
            while (i < PAGE && page.at[i] != page.before[i]) ++i;
            if (i == first) {
                ++i;
                continue;
            }
            say('W', (int64_t)(page.at + first), (int64_t)(i - first));
            transfer(false, page.at + first, i - first);
        }
        munmap(page.at, PAGE);
        munmap(page.before, PAGE);
    }
    page_count = 0;
}

}  // namespace

// The C library's clears whole lines by an instruction (dc zva) that QEMU 7.2 does not begin anew after it faulted.
extern "C" __attribute__((optimize("no-tree-loop-distribute-patterns"))) void* memset(void* at, int value,
                                                                                      size_t size) {
    for (size_t i = 0; i < size; ++i) ((uint8_t*)at)[i] = (uint8_t)value;
    return at;
}

int main(int count, char** arguments) {
    const gc_kernels* kernels = gc_select_kernels(count > 1 ? arguments[1] : "");
    if (!kernels) {
        fprintf(stderr, "there are no kernels %s\n", arguments[1]);
        return 2;
    }
    const bool twice = count > 2 && strcmp(arguments[2], "twice") == 0;
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = fetch;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, 0);
    for (;;) {  // the number of words, and the words of call_by_number
        int64_t words[MOST_WORDS], size;
        transfer(true, &size, sizeof size);
        if (size < 1 || size > MOST_WORDS) return 6;
        transfer(true, words, (size_t)size * sizeof *words);
        const int64_t result = call_by_number(kernels, words);
        if (twice) {
            getppid();
            call_by_number(kernels, words);
            getppid();
        }
        give_back();
        say('R', result, 0);
    }
}
