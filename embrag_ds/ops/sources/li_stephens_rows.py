"""CUDA source of the copying model, first part: what is local to a site, with a warp for every row of neighbours.

These kernels pack mismatches into bits and pad rows, multiply the two recursions, and begin the adjoint. For the
letters see :mod:`embrag_ds.ops.li_stephens`.
"""

SOURCE = r"""
// A chain has THREADS threads, each with PER neighbours, numbered by i. Rows of neighbours are padded to THREADS * PER.
#define LANES 32
#define WARPS (THREADS / LANES)
#define ROW (THREADS * PER)
#define VECTOR (PER < 4 ? PER : 4)
#define ROWS_OF_BLOCK 4  // of the light kernels, which have a warp for a row
#define ALL 0xffffffffu
#define UNROLL _Pragma("unroll")
#define EACH UNROLL for (int i = 0; i < PER; ++i)

struct alignas(4 * VECTOR) Part { float at[VECTOR]; };
struct alignas(8) Pair { float x, y; };

// Neighbour i of a thread, such that the vectors of neighbouring threads are adjacent.
__device__ __forceinline__ int neighbour(int thread, int i)
{
    return i / VECTOR * (VECTOR * THREADS) + VECTOR * thread + i % VECTOR;
}

__device__ __forceinline__ void read(float (&to)[PER], const float* from)
{
    UNROLL for (int j = 0; j < PER / VECTOR; ++j) {
        const Part part = ((const Part*)from)[j * THREADS + threadIdx.x];
        UNROLL for (int v = 0; v < VECTOR; ++v) to[j * VECTOR + v] = part.at[v];
    }
}

__device__ __forceinline__ void write(float* to, const float (&from)[PER])
{
    UNROLL for (int j = 0; j < PER / VECTOR; ++j) {
        Part part;
        UNROLL for (int v = 0; v < VECTOR; ++v) part.at[v] = from[j * VECTOR + v];
        ((Part*)to)[j * THREADS + threadIdx.x] = part;
    }
}

template <int N>
__device__ __forceinline__ void add_lanes(float (&sum)[N], int distance)
{
    UNROLL for (int n = 0; n < N; ++n) sum[n] += __shfl_xor_sync(ALL, sum[n], distance);
}

template <int N>
__device__ __forceinline__ void add_warp(float (&sum)[N])
{
    UNROLL for (int distance = LANES / 2; distance > 0; distance /= 2) add_lanes(sum, distance);
}

// Mismatches as a thread's bits, and the prior's sum over neighbours that agree and over those that differ.
extern "C" __global__ void copying_pack(
    const unsigned char* __restrict__ mismatch,  // [B, T, K]
    const float* __restrict__ prior,             // [B, G, K]
    const long long* __restrict__ place,         // [B, T], which of the G counts at each site
    short* __restrict__ differs,                 // [B, T, THREADS]
    float* __restrict__ weight,                  // [B, T, 2]
    const int B, const int T, const int K, const int G)
{
    const int lane = threadIdx.x % LANES;
    const long long row = (long long)blockIdx.x * ROWS_OF_BLOCK + threadIdx.x / LANES;
    if (row >= (long long)B * T) return;
    mismatch += row * K; prior += (row / T * G + place[row]) * K; differs += row * THREADS;
    float sum[2] = {0.f, 0.f};
    for (int thread = lane; thread < THREADS; thread += LANES) {
        int bits = 0;
        EACH {
            const int k = neighbour(thread, i);
            const bool missed = k >= K || mismatch[k];
            const float share = k < K ? prior[k] : 0.f;
            sum[0] += missed ? 0.f : share;
            sum[1] += missed ? share : 0.f;
            bits |= missed << i;
        }
        differs[thread] = bits;
    }
    add_warp(sum);
    if (lane == 0) {
        weight[2 * row] = sum[0];
        weight[2 * row + 1] = sum[1];
    }
}

extern "C" __global__ void copying_posterior(
    const float* __restrict__ alpha,      // [C, stop, ROW]
    const float* __restrict__ beta,       // [C, T - start, ROW]
    const long long* __restrict__ firsts,  // [B], first of a row's M sites, from start on; the last are below stop
    float* __restrict__ posterior,        // [C, M, K]
    const int C, const int B, const int T, const int K, const int M, const int start, const int stop)
{
    const int lane = threadIdx.x % LANES;
    const long long row = (long long)blockIdx.x * ROWS_OF_BLOCK + threadIdx.x / LANES, c = row / M;
    if (c >= C) return;
    const long long t = firsts[c % B] + row % M;
    alpha += (c * stop + t) * ROW; beta += (c * (T - start) + t - start) * ROW; posterior += row * K;
    float sum[1] = {0.f};
    for (int k = lane; k < K; k += LANES) sum[0] += alpha[k] * beta[k];
    add_warp(sum);
    const float inverse = __fdividef(1.f, sum[0]);
    for (int k = lane; k < K; k += LANES) posterior[k] = alpha[k] * beta[k] * inverse;
}

// d loss / d (alpha beta) is (gradient - mean) / total; times beta it is the part of alpha's gradient at its own site.
extern "C" __global__ void copying_direct(
    const float* __restrict__ alpha, const float* __restrict__ beta, const long long* __restrict__ firsts,
    const float* __restrict__ posterior,
    const float* __restrict__ gradient,  // [C, M, K]
    float* __restrict__ of_alpha,        // [C, M, ROW]
    float* __restrict__ of_beta,         // [C, M, ROW]
    const int C, const int B, const int T, const int K, const int M, const int start, const int stop)
{
    const int lane = threadIdx.x % LANES;
    const long long row = (long long)blockIdx.x * ROWS_OF_BLOCK + threadIdx.x / LANES, c = row / M;
    if (c >= C) return;
    const long long t = firsts[c % B] + row % M;
    alpha += (c * stop + t) * ROW; beta += (c * (T - start) + t - start) * ROW;
    posterior += row * K; gradient += row * K; of_alpha += row * ROW; of_beta += row * ROW;
    float sum[2] = {0.f, 0.f};
    for (int k = lane; k < K; k += LANES) {
        sum[0] += alpha[k] * beta[k];
        sum[1] += gradient[k] * posterior[k];
    }
    add_warp(sum);
    const float inverse = __fdividef(1.f, sum[0]);
    for (int k = lane; k < ROW; k += LANES) {
        const float direct = k < K ? (gradient[k] - sum[1]) * inverse : 0.f;
        of_alpha[k] = direct * beta[k];
        of_beta[k] = direct * alpha[k];
    }
}
"""
