// Runs CUDA kernels on the host. The threads of a block are fibers, which one thread of the processor runs in turn: each
// runs until it waits at a shuffle or a barrier. The order of the turns changes from round to round.
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(threads)
#define __restrict__

struct Place {
    int x;
};
static Place blockIdx, blockDim, threadIdx;

struct Barrier {
    int arrived, round;
};
struct Fiber {
    ucontext_t context;  // where it begins
    jmp_buf turn;
    std::vector<char> stack;
    bool begun, done;
};
static std::vector<Fiber> fibers;
static std::vector<Barrier> warps;
static Barrier block;
static ucontext_t unused;
static jmp_buf scheduler;
static long long arrivals;
static float values[1024];
static int votes[1024];

// swapcontext would ask the system for the mask of signals at every turn, which takes longer than the turn.
static void give_turn_to(int me)
{
    if (_setjmp(scheduler)) return;
    if (fibers[me].begun) _longjmp(fibers[me].turn, 1);
    fibers[me].begun = true;
    swapcontext(&unused, &fibers[me].context);
}
static void give_turn_back(int me)
{
    if (!_setjmp(fibers[me].turn)) _longjmp(scheduler, 1);
}

static void meet(Barrier& barrier, int count)
{
    ++arrivals;
    const int me = threadIdx.x, round = barrier.round;
    if (++barrier.arrived == count) {
        barrier.arrived = 0;
        ++barrier.round;
        return;
    }
    while (barrier.round == round) give_turn_back(me);
}
static void meet_warp()
{
    const int warp = threadIdx.x / 32, left = blockDim.x - 32 * warp;
    meet(warps[warp], left < 32 ? left : 32);
}
static void __syncthreads() { meet(block, blockDim.x); }
static void __syncwarp() { meet_warp(); }
static float __shfl_xor_sync(unsigned, float value, int distance)
{
    values[threadIdx.x] = value;
    meet_warp();
    const float other = values[threadIdx.x ^ distance];
    meet_warp();
    return other;
}
static unsigned __ballot_sync(unsigned, int vote)
{
    votes[threadIdx.x] = vote;
    meet_warp();
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= (unsigned)(votes[threadIdx.x / 32 * 32 + lane] != 0) << lane;
    meet_warp();
    return all;
}
static float __fdividef(float a, float b) { return a / b; }
static int __float_as_int(float value)
{
    int bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
static float __int_as_float(int bits)
{
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }

static void (*entry)(void**);
static void** arguments;
static void fiber_main()
{
    const int me = threadIdx.x;
    entry(arguments);
    fibers[me].done = true;
    ++arrivals;
    _longjmp(scheduler, 1);
}

// Every block in turn; returns 1 if the threads of one wait for ever.
static int run(int blocks, int threads, void (*kernel)(void**), void** given)
{
    entry = kernel;
    arguments = given;
    blockDim.x = threads;
    fibers.resize(threads);
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        warps.assign((threads + 31) / 32, Barrier{});
        block = Barrier{};
        for (auto& each : fibers) {
            each.begun = each.done = false;
            each.stack.resize(1 << 16);
            getcontext(&each.context);
            each.context.uc_stack = {each.stack.data(), 0, each.stack.size()};
            each.context.uc_link = nullptr;
            makecontext(&each.context, fiber_main, 0);
        }
        bool waiting = true;
        for (int round = 0; waiting; ++round) {
            waiting = false;
            const long long before = arrivals;
            for (int i = 0; i < threads; ++i) {
                const int me = round % 2 ? threads - 1 - i : i;
                if (fibers[me].done) continue;
                threadIdx.x = me;
                give_turn_to(me);
                waiting |= !fibers[me].done;
            }
            if (waiting && arrivals == before) return 1;
        }
    }
    return 0;
}

template <class... P, std::size_t... I>
static void call(void (*kernel)(P...), void** given, std::index_sequence<I...>)
{
    kernel(*(P*)given[I]...);
}
template <class... P>
static void call(void (*kernel)(P...), void** given)
{
    call(kernel, given, std::index_sequence_for<P...>{});
}
#define RUNNER(kernel) \
    static void call_##kernel(void** given) { call(kernel, given); } \
    extern "C" int run_##kernel(int blocks, int threads, void** given) \
    { \
        return run(blocks, threads, call_##kernel, given); \
    }
