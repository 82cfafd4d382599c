// Rows of logits, each read where it lies: log-probabilities and their gradient, choosing a token; sums over time.

#pragma once

#include "numbers.hpp"

template <class T>
static float top_of(const T* row, int64_t vocabulary) {
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t v = 0; v < vocabulary; v++) top = wide(row[v]) > top ? wide(row[v]) : top;
    return top;
}

// z = logits / temperature: logp = z[target] - log sum e^z, entropy = -sum p log p, and norm = log sum e^z
template <class T>
static void token_stats(const T* logits, const int64_t* target, float* logp, float* entropy, float* norm, int64_t rows,
                        int64_t vocabulary, float temperature) {
    const float cold = 1.0f / temperature;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const T* row = logits + r * vocabulary;
        const float top = top_of(row, vocabulary);
        float sum = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, weighted)
        for (int64_t v = 0; v < vocabulary; v++) {
            const float z = (wide(row[v]) - top) * cold, e = exponential(z);
            sum += e;
            weighted += z < -87.0f ? 0.0f : e * z;  // 0 times -inf
        }
        const float log_sum = std::log(sum);
        logp[r] = (wide(row[target[r]]) - top) * cold - log_sum;
        entropy[r] = log_sum - weighted / sum;
        norm[r] = top * cold + log_sum;
    }
}

// In place of the logits, those of entries `first` to first + entries - 1 of the vocabulary: what the loss gains by each.
// dlogp/dz = onehot - p, dentropy/dz = -p (log p + entropy)
template <class T>
static void token_gradient(T* logits, const int64_t* target, const float* entropy, const float* norm,
                           const float* grad_logp, const float* grad_entropy, int64_t rows, int64_t entries,
                           int64_t first, float temperature) {
    const float cold = 1.0f / temperature;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        T* row = logits + r * entries;
        const int64_t chosen = target[r] - first;
        const bool here = chosen >= 0 && chosen < entries;
        const float lse = norm[r], gl = grad_logp ? grad_logp[r] : 0.0f, ge = grad_entropy ? grad_entropy[r] : 0.0f;
        const float log_p_chosen = here ? wide(row[chosen]) * cold - lse : 0.0f, shift = entropy[r];
#pragma omp simd
        for (int64_t v = 0; v < entries; v++) {
            const float log_p = wide(row[v]) * cold - lse, p = exponential(log_p);
            const float pull = gl + (log_p < -87.0f ? 0.0f : ge * (log_p + shift));
            store(row + v, -p * pull * cold);
        }
        const float p = exponential(log_p_chosen);
        if (here) store(row + chosen, (gl - p * (gl + ge * (log_p_chosen + shift))) * cold);
    }
}

// The token at which the cumulative distribution passes the row's uniform number, found by sums of blocks and then inside
// one; the most probable one where temperature is 0. Entries from `valid` on are never chosen, nor is one of probability 0.
template <class T>
static void choose(const T* logits, const float* temperature, const double* uniform, int64_t* id, float* logp,
                   int64_t rows, int64_t vocabulary, int64_t valid) {
    constexpr int64_t SIZE = 256;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const T* row = logits + r * vocabulary;
        const float top = top_of(row, valid), cold = temperature[r] > 0 ? 1.0f / temperature[r] : 1.0f;
        std::vector<double> until((valid + SIZE - 1) / SIZE);
        double total = 0;
        for (int64_t b = 0; b < int64_t(until.size()); b++) {
            const int64_t end = (b + 1) * SIZE < valid ? (b + 1) * SIZE : valid;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t v = b * SIZE; v < end; v++) sum += exponential((wide(row[v]) - top) * cold);
            until[b] = total += sum;
        }
        int64_t found = -1;
        if (temperature[r] > 0) {
            const double goal = uniform[r] * total;
            int64_t b = 0;
            while (b + 1 < int64_t(until.size()) && until[b] <= goal) b++;
            double sum = b ? until[b - 1] : 0.0;
            for (int64_t v = b * SIZE; v < valid && (v < (b + 1) * SIZE || found < 0); v++) {
                const float p = exponential((wide(row[v]) - top) * cold);
                sum += p;
                if (p > 0) found = v;
                if (p > 0 && sum > goal) break;
            }
        }
        for (int64_t v = 0; found < 0 && v < valid; v++)
            if (wide(row[v]) == top) found = v;
        id[r] = found < 0 ? 0 : found;  // a row of nan has no highest entry; its log-probability says so
        logp[r] = (wide(row[id[r]]) - top) * cold - float(std::log(total));
    }
}

// y_t = x_t + decay y_{t+1} inside each episode, from its end; y behind the last is tail, where there is one
static void discounted_sums(const float* x, const int64_t* starts, const float* tail, float* y, int64_t episodes, float decay) {
#pragma omp parallel for schedule(dynamic, 16)
    for (int64_t b = 0; b < episodes; b++) {
        float sum = tail ? tail[b] : 0.0f;
        for (int64_t t = starts[b + 1] - 1; t >= starts[b]; t--) y[t] = sum = x[t] + decay * sum;
    }
}
