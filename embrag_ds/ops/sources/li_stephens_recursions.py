"""CUDA source of the copying model, second part: the recursions along a chain and their adjoints.

The names of the first part, :mod:`embrag_ds.ops.sources.li_stephens_rows`, come before. For what decides the speed see
:mod:`embrag_ds.ops.li_stephens_cuda`.
"""

SOURCE = r"""
// Completes the sums ``older`` over the chain's threads, and begins those of ``newer``, for the next call to complete.
// A row of scratch is written again two calls later, after a barrier that no thread passes before all have read it.
template <int N>
__device__ __forceinline__ void add_up(float (&older)[N], float (&newer)[N], float* scratch, int& turn)
{
    add_lanes(newer, 16);
    add_lanes(older, 4);
    add_lanes(newer, 8);
    add_lanes(older, 2);
    add_lanes(older, 1);
#if WARPS > 1
    turn ^= 1;
    float* row = scratch + turn * N * WARPS;
    UNROLL for (int n = 0; n < N; ++n)
        if (threadIdx.x % LANES == 0) row[n * WARPS + threadIdx.x / LANES] = older[n];
    __syncthreads();
    UNROLL for (int n = 0; n < N; ++n) {
        older[n] = row[n * WARPS];
        UNROLL for (int warp = 1; warp < WARPS; ++warp) older[n] += row[n * WARPS + warp];
    }
#endif
}

// Calls step(n, row) for n below count, where row is what read_row(row, n) filled AHEAD steps before. Kernels that use
// it do not promise that their pointers differ (__restrict__): the compiler would move all loads down to the next use.
template <class Row, class Read, class Step>
__device__ __forceinline__ void for_rows(int count, Read read_row, Step step)
{
    Row ahead[AHEAD];
    UNROLL for (int j = 0; j < AHEAD; ++j) read_row(ahead[j], min(j, count - 1));
    for (int start = 0; start < count; start += AHEAD) {
        UNROLL for (int j = 0; j < AHEAD; ++j) {
            const int n = start + j;
            if (n >= count) return;
            step(n, ahead[j]);
            read_row(ahead[j], min(n + AHEAD, count - 1));
        }
    }
}

// Emission factors of one site: ratio for neighbours that differ, 1 for the others.
struct Emission {
    int differs;  // a bit for each neighbour of the thread; set in the padding
    float ratio;
    int place;    // the prior that counts there
    __device__ __forceinline__ bool missed(int i) const { return differs & 1 << i; }
    __device__ __forceinline__ float of(int i) const { return missed(i) ? ratio : 1.f; }
};

struct Site : Emission { float jump, agreeing, differing; };

// States are unnormalised between sites, and kept near these powers of two. They may fall by exp(-30), the least
// emission factor, at two sites in succession, and beta exceeds its weighted mean by at most the inverse of a prior.
#define FORWARD_EXPONENT 100
#define BACKWARD_EXPONENT 60

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((127 + exponent) << 23); }

// Power of two that brings a positive total to between two to the exponent and the double of that.
__device__ __forceinline__ float scale_of(float total, int exponent)
{
    return __int_as_float(((254u + exponent) << 23) - (__float_as_int(total) & 0x7f800000u));
}

// Blocks of even number run up through alpha, the others down through beta.
extern "C" __global__ void __launch_bounds__(THREADS) copying_passes(
    const short* differs, const float* weight,
    const float* mismatch_ratio,  // [C, T], emission factor of a mismatch
    const float* recombination,   // [C, T]
    const float* prior,           // [B, G, K]
    const long long* place,       // [B, T], which of the G counts at each site
    const long long* firsts,      // [B], first of a row's M sites, from start on; the last are below stop
    float* alpha,                 // [C, stop, ROW]: the posterior does not depend on later ones
    float* beta,                  // [C, T - start, ROW], from site start on
    float* alpha_factors,         // [C, stop, 2], what the adjoint needs: see there
    float* beta_factors,          // [C, T - start, 2]
    const int B, const int T, const int K, const int M, const int start, const int stop, const int G)
{
    __shared__ float scratch[2 * WARPS];
    const long long c = blockIdx.x / 2, b = c % B;
    const int first = firsts[b], last = first + M;
    differs += b * T * THREADS + threadIdx.x; weight += b * T * 2; prior += b * G * K; place += b * T;
    mismatch_ratio += c * T; recombination += c * T;
    alpha += c * stop * ROW; beta += (c * (T - start) + first - start) * ROW;
    alpha_factors += c * stop * 2; beta_factors += (c * (T - start) + first - start) * 2;
    float of[PER], state[PER], older[1] = {0.f};
    int turn = 0, drawn_from = -1;
    EACH of[i] = state[i] = 0.f;
    // The prior stays in registers until the place changes.
    const auto draw_from = [&](int here) {
        if (here == drawn_from) return;
        drawn_from = here;
        EACH {
            const int k = neighbour(threadIdx.x, i);
            if (k < K) of[i] = prior[(long long)here * K + k];
        }
    };
    const auto site_at = [&](Site& site, int t) {
        site.differs = differs[(long long)t * THREADS];
        site.place = place[t];
        const Pair sums = ((const Pair*)weight)[t];
        site.agreeing = sums.x;
        site.differing = sums.y;
        site.ratio = mismatch_ratio[t];
        site.jump = recombination[t];
    };
    // The sum of the state is total = keep older + more (total before it).
    float keep = 0.f, more = 1.f;
    if (blockIdx.x % 2 == 0) {
        float total = power_of_two(FORWARD_EXPONENT);
        for_rows<Site>(last + 1, [&](Site& site, int t) { site_at(site, min(t, last - 1)); },
                       [&](int t, const Site& site) {
            draw_from(site.place);
            float moved[PER], fresh[PER], newer[1] = {0.f};
            EACH {
                const float emitted = site.of(i);
                moved[i] = emitted * state[i];
                fresh[i] = emitted * of[i];
                newer[0] += moved[i];
            }
            add_up(older, newer, scratch, turn);
            const float stayed = keep * older[0], before = total;
            total = stayed + more * before;
            const float inverse = __fdividef(1.f, total), scale = scale_of(total, FORWARD_EXPONENT);
            if (t > 0) {
                float row[PER];
                EACH row[i] = state[i] * inverse;
                write(alpha + (long long)(t - 1) * ROW, row);
                if (threadIdx.x == 0) ((Pair*)alpha_factors)[t - 1] = {before * inverse, stayed * inverse};
            }
            const float jump = t > 0 ? site.jump : 1.f, arrived = jump * total;
            keep = 1.f - jump;
            more = jump * (site.agreeing + site.ratio * site.differing);
            EACH state[i] = (keep * moved[i] + arrived * fresh[i]) * scale;
            total *= scale;
            older[0] = newer[0] * scale;
        });
        return;
    }
    float total = power_of_two(BACKWARD_EXPONENT), jump = 1.f, stay = 0.f;  // of the site after t
    for_rows<Site>(T - first, [&](Site& site, int n) { site_at(site, T - 1 - n); }, [&](int n, const Site& site) {
        const int t = T - 1 - n;
        draw_from(site.place);
        float seen[PER], emitted[PER], newer[1] = {0.f};  // state is that of the site after t, times its emission
        EACH {
            emitted[i] = site.of(i);
            seen[i] = emitted[i] * state[i];
            newer[0] += of[i] * seen[i];
        }
        add_up(older, newer, scratch, turn);
        const float before = total;
        total = keep * older[0] + more * before;
        const float inverse = __fdividef(1.f, total), scale = scale_of(total, BACKWARD_EXPONENT);
        const float arrived = jump * total;
        float row[PER];
        EACH row[i] = (stay * state[i] + arrived) * inverse;
        write(beta + (long long)(t - first) * ROW, row);
        if (threadIdx.x == 0 && n > 0)
            ((Pair*)beta_factors)[t + 1 - first] = {before * inverse, stay * older[0] * inverse};
        EACH state[i] = (stay * seen[i] + arrived * emitted[i]) * scale;
        keep = stay;
        more = jump * (site.agreeing + site.ratio * site.differing);
        jump = site.jump;
        stay = 1.f - jump;
        total *= scale;
        older[0] = newer[0] * scale;
    });
}

struct Row : Emission { float jump, inverse, lean, state[PER], direct[PER]; };

// Blocks of even number run down through the gradient of alpha, the others up through that of beta. At each site the
// forward pass left, of S[t] = stay R + ..., S[t-1] / S[t] and stay R / S[t]; the backward pass likewise of its own.
// With mean[t] the sum of gradient times alpha at t, mean[t-1] = sum(part[k] alpha[t-1][k]) - stay R / S[t] mean[t],
// where part is the gradient at t - 1 without its term of mean[t].
extern "C" __global__ void __launch_bounds__(THREADS) copying_adjoint(
    const short* differs, const float* mismatch_ratio,
    const float* recombination, const float* prior, const long long* place, const long long* firsts,
    const float* alpha, const float* beta, const float* alpha_factors, const float* beta_factors,
    const float* of_alpha, const float* of_beta,
    float* ratio_gradient,          // [C, 2, T], of either recursion; zero at the start
    float* recombination_gradient,  // [C, 2, T], likewise
    float* prior_gradient,          // [C, 2, G, K], likewise
    const int B, const int T, const int K, const int M, const int start, const int stop, const int G)
{
    __shared__ float scratch[2 * 3 * WARPS];
    const long long c = blockIdx.x / 2, b = c % B;
    const int first = firsts[b], last = first + M;
    differs += b * T * THREADS + threadIdx.x; prior += b * G * K; place += b * T;
    mismatch_ratio += c * T; recombination += c * T;
    alpha += c * stop * ROW; beta += (c * (T - start) + first - start) * ROW;
    alpha_factors += c * stop * 2; beta_factors += (c * (T - start) + first - start) * 2;
    of_alpha += c * M * ROW; of_beta += c * M * ROW;
    ratio_gradient += (long long)blockIdx.x * T; recombination_gradient += (long long)blockIdx.x * T;
    prior_gradient += (long long)blockIdx.x * G * K;
    float of[PER], of_gradient[PER], chain[PER], older[3] = {0.f, 0.f, 0.f}, missed = 0.f;
    int turn = 0, drawn_from = place[blockIdx.x % 2 == 0 ? last - 1 : first];
    EACH {
        const int k = neighbour(threadIdx.x, i);
        of[i] = k < K ? prior[(long long)drawn_from * K + k] : 0.f;
        of_gradient[i] = chain[i] = 0.f;
    }
    // No other block adds to this one's part of the gradient.
    const auto write_gradient = [&] {
        EACH {
            const int k = neighbour(threadIdx.x, i);
            if (k < K) prior_gradient[(long long)drawn_from * K + k] += of_gradient[i];
        }
    };
    const auto draw_from = [&](int here) {
        if (here == drawn_from) return;
        write_gradient();
        drawn_from = here;
        EACH {
            const int k = neighbour(threadIdx.x, i);
            if (k < K) of[i] = prior[(long long)here * K + k];
            of_gradient[i] = 0.f;
        }
    };
    const auto emission_at = [&](Row& row, int t) {
        row.differs = differs[(long long)t * THREADS];
        row.place = place[t];
        row.ratio = mismatch_ratio[t];
        row.jump = recombination[t];
    };
    const bool writes = threadIdx.x == 0;
    if (blockIdx.x % 2 == 0) {
        float mean = 0.f, lean = 0.f, moved = 0.f;
        for_rows<Row>(last + 1, [&](Row& row, int n) {
            const int t = min(last - n, last - 1), before = max(last - n - 1, 0);
            emission_at(row, t);
            const Pair factors = ((const Pair*)alpha_factors)[t];
            row.inverse = factors.x;
            row.lean = factors.y;
            read(row.state, alpha + (long long)before * ROW);
            read(row.direct, of_alpha + (long long)max(before - first, 0) * ROW);
        }, [&](int n, const Row& row) {
            draw_from(row.place);
            const int t = last - n;  // chain is the gradient of alpha at t, and zero at first
            const float jump = t > 0 ? row.jump : 1.f, stay = n > 0 ? 1.f - jump : 0.f;
            const float inverse = n > 0 ? row.inverse : 0.f, step = stay * inverse;
            const float directly = t > first ? 1.f : 0.f;
            float part[PER], newer[3] = {0.f, missed, moved};
            EACH {
                part[i] = step * row.of(i) * chain[i] + directly * row.direct[i];
                newer[0] += part[i] * row.state[i];
            }
            add_up(older, newer, scratch, turn);
            if (writes && n > 2) {
                ratio_gradient[t + 2] = older[1];
                recombination_gradient[t + 2] = older[2];
            }
            mean = older[0] - lean * mean;
            lean = row.lean;
            missed = moved = 0.f;
            EACH {
                const float emitted = row.of(i), inner = (chain[i] - mean) * inverse;
                missed += row.missed(i) ? inner * (jump * of[i] + stay * row.state[i]) : 0.f;
                of_gradient[i] += jump * (inner * emitted);
                moved += inner * emitted * (of[i] - row.state[i]);
                chain[i] = part[i] - mean * (step * emitted);
            }
            if (t == 0) moved = 0.f;
            UNROLL for (int n = 0; n < 3; ++n) older[n] = newer[n];
        });
        float newer[3] = {0.f, missed, moved};
        add_up(older, newer, scratch, turn);
        if (writes && last > 1) {
            ratio_gradient[1] = older[1];
            recombination_gradient[1] = older[2];
        }
        add_up(newer, older, scratch, turn);
        if (writes) ratio_gradient[0] = newer[1];
    } else {
        float weighed = 0.f, lean = 0.f;
        Emission here = {0, 0.f, drawn_from};
        float inverse = 0.f, step = 0.f, next_lean = 0.f, state[PER];
        EACH state[i] = 0.f;
        for_rows<Row>(T - first, [&](Row& row, int n) {
            const int after = min(n + 1, T - first - 1);
            emission_at(row, first + after);
            const Pair factors = ((const Pair*)beta_factors)[after];
            row.inverse = factors.x;
            row.lean = factors.y;
            read(row.state, beta + (long long)after * ROW);
            read(row.direct, of_beta + (long long)min(n, M - 1) * ROW);
        }, [&](int n, const Row& row) {
            draw_from(here.place);
            const int t = first + n;  // chain is the gradient of beta at t - 1; at first it is zero, and so is step
            const float directly = t < last ? 1.f : 0.f;
            float part[PER], newer[3] = {0.f, 0.f, missed};
            EACH {
                part[i] = step * here.of(i) * chain[i] + directly * row.direct[i];
                newer[0] += part[i] * (row.state[i] * row.of(i));
                newer[1] += chain[i];
            }
            add_up(older, newer, scratch, turn);
            if (writes && n > 1) recombination_gradient[t - 1] = older[1] - weighed;
            if (writes && n > 2) ratio_gradient[t - 2] = older[2];
            weighed = inverse * older[0] - lean * weighed;
            missed = 0.f;
            EACH {
                const float emitted = step * here.of(i), pull = weighed * of[i];
                missed += here.missed(i) ? step * (chain[i] - pull) * state[i] : 0.f;
                of_gradient[i] -= weighed * emitted * state[i];
                chain[i] = part[i] - pull * emitted;
                state[i] = row.state[i];
            }
            lean = next_lean;
            next_lean = row.lean;
            here = row;
            inverse = row.inverse;
            step = (1.f - row.jump) * inverse;
            UNROLL for (int n = 0; n < 3; ++n) older[n] = newer[n];
        });
        float newer[3] = {0.f, 0.f, missed};
        add_up(older, newer, scratch, turn);
        if (writes && T - first > 1) recombination_gradient[T - 1] = older[1] - weighed;
        if (writes && T - first > 2) ratio_gradient[T - 2] = older[2];
        add_up(newer, older, scratch, turn);
        if (writes && T - first > 1) ratio_gradient[T - 1] = newer[2];
    }
    write_gradient();
}
"""
