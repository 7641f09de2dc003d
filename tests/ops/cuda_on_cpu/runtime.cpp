// Runs the threads of a CUDA block as fibers on one CPU thread, strictly: what CUDA leaves undefined is an error here.
//  - A barrier must be reached by every thread of the block, at the same place; a shuffle by every lane of its mask.
//  - Between barriers each warp runs as far as it can before the next one starts; warps, lanes and blocks go up or down
//    (emulator_order), so that results which depend on the order differ.
//  - Sources are compiled with -fsanitize=thread,alignment,... and the callbacks end here instead of in a library. Each
//    access to shared memory or to a buffer named by emulator_allow is checked: bounds, permission, initialised shared
//    memory, and races: two accesses to one element, one of them a write, with no barrier between them. Blocks have
//    none, so whatever one writes no other may touch.
#include <csetjmp>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <unordered_map>
#include <vector>

#include "shim.h"

#define EXPORT extern "C" __attribute__((visibility("default")))
extern char __bss_start[] __attribute__((visibility("hidden")));
extern char _end[] __attribute__((visibility("hidden")));

namespace pyarith::emulator {
namespace {

constexpr size_t stack_size = 128 << 10;
constexpr int most_threads = 1024;

enum class State { ready, at_barrier, at_exchange, done };

struct Fiber {
    ucontext_t context;
    jmp_buf resume;
    bool started = false;
    State state = State::done;
    Site site{};
    unsigned mask = 0;
    int source = 0;
    uint64_t bits = 0;
};

// Who touched an element last. Two readers are enough: the latest, and the latest that is another thread.
struct Access {
    int64_t block = -1;
    int thread = -1, epoch = -1;
};
struct Record {
    Access write, read, other_read;
    int64_t first_reading_block = -1;
};

struct Buffer {
    uintptr_t begin, end;
    int64_t element;
    bool readable, writable;
    std::vector<Record> records;
};

struct Machine {
    std::vector<Fiber> fibers = std::vector<Fiber>(most_threads);
    char* stacks = static_cast<char*>(mmap(nullptr, most_threads * stack_size, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    jmp_buf scheduler;
    dim3 grid, block, block_at;
    int64_t block_number = 0;
    int threads = 0, current = -1, epoch = 0;
    bool threads_down = false, blocks_down = false;
    void (*body)(const void*) = nullptr;
    const void* call = nullptr;
    size_t call_size = 0;
    std::string error;
    std::vector<Buffer> buffers;
    std::unordered_map<uintptr_t, Record> shared;  // by byte
};

// On the heap: the kernels' shared arrays are the only data of this module between __bss_start and _end that
// instrumented code touches.
Machine& machine() {
    static Machine* const one = new Machine;
    return *one;
}

dim3 unflatten(int64_t i, dim3 size) {
    return dim3(static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
                static_cast<unsigned>(i / size.x / size.y));
}

std::string text(const char* format, ...) {
    char line[400];
    va_list values;
    va_start(values, format);
    std::vsnprintf(line, sizeof line, format, values);
    va_end(values);
    return line;
}

std::string where(Site site) { return text("%s:%d", site.file, site.line); }

void yield() {
    Machine& m = machine();
    if (_setjmp(m.fibers[m.current].resume) == 0) _longjmp(m.scheduler, 1);
}

// Ends the launch: the scheduler never resumes a fiber once there is an error.
void fail(const std::string& what) {
    Machine& m = machine();
    if (m.current < 0) {
        std::fprintf(stderr, "%s (outside of a kernel)\n", what.c_str());
        std::abort();
    }
    m.error = what + text(" [block %lld, thread %d]", static_cast<long long>(m.block_number), m.current);
    _longjmp(m.scheduler, 1);
}

void fiber_main() {
    for (;;) {
        Machine& m = machine();
        m.body(m.call);
        m.fibers[m.current].state = State::done;
        yield();
    }
}

void resume(int thread) {
    Machine& m = machine();
    Fiber& fiber = m.fibers[thread];
    m.current = thread;
    if (_setjmp(m.scheduler) == 0) {
        if (fiber.started) _longjmp(fiber.resume, 1);
        fiber.started = true;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = m.stacks + thread * stack_size;
        fiber.context.uc_stack.ss_size = stack_size;
        makecontext(&fiber.context, fiber_main, 0);
        setcontext(&fiber.context);
    }
    m.current = -1;
}

// Completes the exchanges of a warp whose lanes are all there; returns whether there was one.
bool exchanged(int first) {
    Machine& m = machine();
    bool any = false;
    for (int lane = 0; lane < 32 && first + lane < m.threads; ++lane) {
        const Fiber& fiber = m.fibers[first + lane];
        if (fiber.state != State::at_exchange) continue;
        const unsigned mask = fiber.mask;
        bool complete = true;
        for (int other = 0; other < 32; ++other) {
            if (!(mask >> other & 1)) continue;
            const Fiber& there = m.fibers[first + other];
            complete = complete && first + other < m.threads && there.state == State::at_exchange &&
                       there.mask == mask && there.site.line == fiber.site.line && there.site.file == fiber.site.file;
        }
        if (!complete) continue;
        uint64_t values[32];
        for (int other = 0; other < 32; ++other)
            if (mask >> other & 1) values[other] = m.fibers[first + m.fibers[first + other].source].bits;
        for (int other = 0; other < 32; ++other) {
            if (!(mask >> other & 1)) continue;
            m.fibers[first + other].bits = values[other];
            m.fibers[first + other].state = State::ready;
        }
        any = true;
    }
    return any;
}

std::string describe(int thread) {
    const Fiber& fiber = machine().fibers[thread];
    if (fiber.state == State::done) return text("thread %d has left the kernel", thread);
    const char* what = fiber.state == State::at_barrier ? "the barrier" : "the shuffle";
    return text("thread %d waits at %s ", thread, what) + where(fiber.site);
}

void run_block() {
    Machine& m = machine();
    for (int t = 0; t < m.threads; ++t) m.fibers[t].state = State::ready;
    const int warps = (m.threads + 31) / 32;
    for (m.epoch = 0;; ++m.epoch) {
        for (int i = 0; i < warps; ++i) {
            const int first = 32 * (m.threads_down ? warps - 1 - i : i);
            do {
                for (int j = 0; j < 32; ++j) {
                    const int t = first + (m.threads_down ? 31 - j : j);
                    if (t >= m.threads || m.fibers[t].state != State::ready) continue;
                    resume(t);
                    if (!m.error.empty()) return;
                }
            } while (exchanged(first));
        }
        // Nothing can run any more: all have left, all are at one barrier, or the block hangs.
        for (int t = 0; t < m.threads; ++t) {
            const Fiber &one = m.fibers[t], &first = m.fibers[0];
            const bool same = one.state == first.state && one.site.line == first.site.line &&
                              (one.state == State::done || one.site.file == first.site.file);
            if (one.state == State::at_exchange || (!same && one.state != State::done) ||
                (!same && first.state != State::done)) {
                m.error = "not all threads get there: " + describe(t) + ", " + describe(t ? 0 : 1 % m.threads) +
                          text(" [block %lld]", static_cast<long long>(m.block_number));
                return;
            }
        }
        if (m.fibers[0].state == State::done) return;
        for (int t = 0; t < m.threads; ++t) m.fibers[t].state = State::ready;
    }
}

bool ordered(const Access& before, const Access& now) {  // the same thread, or a barrier between them
    return before.block < 0 || (before.block == now.block && (before.thread == now.thread || before.epoch < now.epoch));
}

void touch(Record& record, bool write, const char* memory, uintptr_t address) {
    const Machine& m = machine();
    const Access now{m.block_number, m.current, m.epoch};
    const Access* against = nullptr;
    if (!ordered(record.write, now)) against = &record.write;
    if (write && !ordered(record.read, now)) against = &record.read;
    if (write && !ordered(record.other_read, now)) against = &record.other_read;
    const bool from_another_block = record.first_reading_block >= 0 && record.first_reading_block != now.block;
    if (against || (write && from_another_block)) {
        const int64_t block = against ? against->block : record.first_reading_block;
        fail(text("race in %s memory at %p: this %s and block %lld's %s, thread %d", memory,
                  reinterpret_cast<void*>(address), write ? "write" : "read", static_cast<long long>(block),
                  against == &record.write ? "write" : "read", against ? against->thread : -1));
    }
    if (write) {
        record.write = now;
        return;
    }
    if (record.first_reading_block < 0) record.first_reading_block = now.block;
    if (record.read.block != now.block || record.read.thread != now.thread) record.other_read = record.read;
    record.read = now;
}

void check(const void* pointer, size_t size, bool write) {
    Machine& m = machine();
    if (m.current < 0) return;  // host code of the .cu
    const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    const uintptr_t stacks = reinterpret_cast<uintptr_t>(m.stacks), call = reinterpret_cast<uintptr_t>(m.call);
    if (address - stacks < most_threads * stack_size) return;  // a thread's own variables
    if (!write && address >= call && address + size <= call + m.call_size) return;
    if (address >= reinterpret_cast<uintptr_t>(__bss_start) && address < reinterpret_cast<uintptr_t>(_end)) {
        for (uintptr_t byte = address; byte < address + size; ++byte) {
            Record& record = m.shared[byte];
            if (!write && record.write.block != m.block_number)
                fail(text("read of shared memory at %p that no thread has written", pointer));
            touch(record, write, "shared", byte);
        }
        return;
    }
    for (Buffer& buffer : m.buffers) {
        if (address < buffer.begin || address + size > buffer.end) continue;
        if (write ? !buffer.writable : !buffer.readable)
            fail(text("%s a buffer that is only %s", write ? "write to" : "read of", write ? "read" : "written"));
        for (size_t i = (address - buffer.begin) / buffer.element; i * buffer.element < address + size - buffer.begin;
             ++i)
            touch(buffer.records[i], write, "global", address);
        return;
    }
    if (!m.buffers.empty())
        fail(text("%s of %zu bytes at %p, outside of every buffer", write ? "write" : "read", size, pointer));
}

}  // namespace

dim3 thread_index() { return unflatten(machine().current, machine().block); }
dim3 block_index() { return machine().block_at; }
dim3 block_size() { return machine().block; }
dim3 grid_size() { return machine().grid; }

void barrier(Site site) {
    Fiber& fiber = machine().fibers[machine().current];
    fiber.site = site;
    fiber.state = State::at_barrier;
    yield();
}

uint64_t exchange(unsigned mask, uint64_t bits, int source, Site site) {
    Fiber& fiber = machine().fibers[machine().current];
    if (!(mask >> lane() & 1)) fail("a shuffle by a lane that its mask leaves out at " + where(site));
    if (source < 0 || source > 31 || !(mask >> source & 1))
        fail("a shuffle from a lane that its mask leaves out at " + where(site));
    fiber.site = site;
    fiber.mask = mask;
    fiber.source = source;
    fiber.bits = bits;
    fiber.state = State::at_exchange;
    yield();
    return fiber.bits;
}

const char* run(dim3 grid, dim3 block, void (*body)(const void*), const void* call, size_t call_size) {
    Machine& m = machine();
    const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
    const int64_t threads = static_cast<int64_t>(block.x) * block.y * block.z;
    if (blocks == 0 || threads == 0 || threads > most_threads || block.z > 64 || grid.x > INT32_MAX ||
        grid.y > 65535 || grid.z > 65535)
        return "invalid configuration argument";
    m.grid = grid;
    m.block = block;
    m.threads = static_cast<int>(threads);
    m.body = body;
    m.call = call;
    m.call_size = call_size;
    m.error.clear();
    for (Buffer& buffer : m.buffers) buffer.records.assign(buffer.records.size(), {});
    for (int64_t i = 0; i < blocks && m.error.empty(); ++i) {
        m.block_number = m.blocks_down ? blocks - 1 - i : i;
        m.block_at = unflatten(m.block_number, grid);
        m.shared.clear();
        run_block();
    }
    if (m.error.empty()) return nullptr;
    for (Fiber& fiber : m.fibers) fiber.started = false;  // abandoned in the middle of a kernel
    return m.error.c_str();
}

EXPORT void emulator_order(bool threads_down, bool blocks_down) {
    machine().threads_down = threads_down;
    machine().blocks_down = blocks_down;
}

// Kernels may touch nothing but the buffers named since emulator_forbid, and anything where none was named.
EXPORT void emulator_allow(const void* begin, int64_t elements, int64_t element, bool readable, bool writable) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(begin);
    machine().buffers.push_back({first, first + elements * element, element, readable, writable,
                                 std::vector<Record>(static_cast<size_t>(elements))});
}

EXPORT void emulator_forbid() { machine().buffers.clear(); }

// --- What -fsanitize=thread and -fsanitize=alignment,... call ------------------------------------------------------
#define ACCESS(SIZE)                                                                        \
    extern "C" void __tsan_read##SIZE(void* p) { check(p, SIZE, false); }                       \
    extern "C" void __tsan_write##SIZE(void* p) { check(p, SIZE, true); }                       \
    extern "C" void __tsan_unaligned_read##SIZE(void* p) { check(p, SIZE, false); }             \
    extern "C" void __tsan_unaligned_write##SIZE(void* p) { check(p, SIZE, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
extern "C" void __tsan_read_range(void* p, size_t size) { check(p, size, false); }
extern "C" void __tsan_write_range(void* p, size_t size) { check(p, size, true); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

struct Place {  // the first field of every description that the checks pass
    const char* file;
    uint32_t line, column;
};
#define UNDEFINED(NAME, WHAT, ...)                                      \
    extern "C" void __ubsan_handle_##NAME(const Place* at, __VA_ARGS__) {   \
        fail(WHAT + where({at->file, static_cast<int>(at->line)}));         \
    }
UNDEFINED(type_mismatch_v1, "misaligned address at ", void*)
UNDEFINED(out_of_bounds, "index out of bounds at ", void*)
UNDEFINED(add_overflow, "integer overflow at ", void*, void*)
UNDEFINED(sub_overflow, "integer overflow at ", void*, void*)
UNDEFINED(mul_overflow, "integer overflow at ", void*, void*)
UNDEFINED(negate_overflow, "integer overflow at ", void*)
UNDEFINED(divrem_overflow, "division by zero or overflow at ", void*, void*)
UNDEFINED(shift_out_of_bounds, "shift out of range at ", void*, void*)

}  // namespace pyarith::emulator
