// What a decoding step and a training step do between their matrix products, each in one pass over memory.
// T is float or bf16; sums and exponentials are in float. A row is computed by one thread, in a fixed order: neither
// the number of threads nor the rest of the batch changes a digit of it.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

struct bf16 {
    uint16_t bits;
};

static inline float wide(float x) { return x; }
static inline float wide(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
static inline void store(float* place, float x) { *place = x; }
static inline void store(bf16* place, float x) {  // to the nearest, ties to even; a nan stays one
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    place->bits = uint16_t(x == x ? rounded : 0x7fc0);
}

static inline float rounded(const float*, float x) { return x; }
static inline float rounded(const bf16*, float x) {
    bf16 y;
    store(&y, x);
    return wide(y);
}

// e^x to 2 units in the last place between -87 and 88, 0 below and e^88 above. No branch: loops over it become vector code.
static inline float exponential(float x) {
    const float low = x < -87.0f ? -87.0f : x, bound = low > 88.0f ? 88.0f : low;
    const float whole = std::nearbyintf(bound * 1.44269504f);
    const float rest = (bound - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    const int32_t power = (int32_t(whole) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return x < -87.0f ? 0.0f : sum * scale;
}

// --------------------------------------------------------------------------------------------------------- lanes
// 32 numbers are read as two vectors of 16. Of bf16 they are the even and the odd ones, which costs a shift and a mask.

typedef float lanes __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));

static inline void load(const bf16* x, lanes& a, lanes& b) {
    words w, even, odd;
    std::memcpy(&w, x, 64);
    even = w << 16;
    odd = w & 0xffff0000u;
    std::memcpy(&a, &even, 64);
    std::memcpy(&b, &odd, 64);
}
static inline void load(const float* x, lanes& a, lanes& b) {
    std::memcpy(&a, x, 64);
    std::memcpy(&b, x + 16, 64);
}
static inline void spread(const bf16*, const lanes& a, const lanes& b, float* out) {
    for (int i = 0; i < 16; i++) out[2 * i] = a[i], out[2 * i + 1] = b[i];
}
static inline void spread(const float*, const lanes& a, const lanes& b, float* out) {
    std::memcpy(out, &a, 64);
    std::memcpy(out + 16, &b, 64);
}

// ---------------------------------------------------------------------------------------------- decoding attention
// Keys of a (slot, kv head) stand in blocks of 32 tokens, (capacity / 32, width, 32): read once, in order, and summed
// without a horizontal addition. Values stand token by token, (capacity, width). width is a multiple of 32.

constexpr int64_t BLOCK = 32;

template <class T>
static void turn(const T* x, const T* cos, const T* sin, int64_t width, float* out) {  // rotary positions, halves
    const int64_t half = width / 2;
    if (!cos) {
        for (int64_t i = 0; i < width; i++) out[i] = wide(x[i]);
        return;
    }
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float a = wide(x[i]), b = wide(x[i + half]), c = wide(cos[i]), s = wide(sin[i]);
        out[i] = a * c - b * s;
        out[i + half] = b * c + a * s;
    }
}

// score[g][j] = q_g . key_j for the blocks that hold tokens first to at; what is read next is fetched ahead
template <class T, int G>
static void products(const float* q, const T* K, const T* V, float* score, int64_t first, int64_t at, int64_t width,
                     int64_t capacity) {
    for (int64_t j = first / BLOCK * BLOCK; j <= at; j += BLOCK) {
        lanes a[G] = {}, b[G] = {};
        const T* ahead = j + BLOCK <= at ? K + (j + BLOCK) * width : V + first * width;
        for (int64_t i = 0; i < width; i++) {
            lanes x, y;
            load(K + j * width + i * BLOCK, x, y);
            __builtin_prefetch(ahead + i * BLOCK);
            for (int g = 0; g < G; g++) a[g] += x * q[g * width + i], b[g] += y * q[g * width + i];
        }
        for (int g = 0; g < G; g++) spread(K, a[g], b[g], score + g * capacity + j);
    }
}

// mixed[g] = sum_j score[g][j] value_j, over C times 32 columns
template <class T, int G, int C>
static void mix(const float* score, const T* V, const T* next, float* mixed, int64_t first, int64_t at, int64_t width,
                int64_t capacity) {
    lanes a[G][C] = {}, b[G][C] = {};
    for (int64_t j = first; j <= at; j++) {
        const T* ahead = j + BLOCK <= at ? V + (j + BLOCK) * width : next + (j + BLOCK - at - 1) * width;
        for (int c = 0; c < C; c++) {
            lanes x, y;
            load(V + j * width + 32 * c, x, y);
            __builtin_prefetch(ahead + 32 * c);
            for (int g = 0; g < G; g++) a[g][c] += x * score[g * capacity + j], b[g][c] += y * score[g * capacity + j];
        }
    }
    for (int g = 0; g < G; g++)
        for (int c = 0; c < C; c++) spread(V, a[g][c], b[g][c], mixed + g * width + 32 * c);
}

static void softmax(float* x, int64_t first, int64_t at) {
    float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
    for (int64_t j = first; j <= at; j++) top = x[j] > top ? x[j] : top;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = first; j <= at; j++) sum += x[j] = exponential(x[j] - top);
    const float share = 1.0f / sum;
#pragma omp simd
    for (int64_t j = first; j <= at; j++) x[j] *= share;
}

template <class T, int G>
static void look(const float* q, const T* K, const T* V, float* score, float* mixed, int64_t first, int64_t at,
                 int64_t width, int64_t capacity) {
    products<T, G>(q, K, V, score, first, at, width, capacity);
    for (int g = 0; g < G; g++) softmax(score + g * capacity, first, at);
    const T* next = K + capacity * width;  // the next head's keys
    int64_t i = 0;
    for (; i + 64 <= width; i += 64) mix<T, G, 2>(score, V + i, next, mixed + i, first, at, width, capacity);
    for (; i < width; i += 32) mix<T, G, 1>(score, V + i, next, mixed + i, first, at, width, capacity);
}

// One new token in each of `slots`: its key and value go into the cache at place length[slot], and its queries look at
// everything up to it. qkv: rows of (heads + 2 kv_heads) x width.
template <class T>
static void attend(const T* qkv, const T* cos, const T* sin, T* keys, T* values, const int64_t* length, T* out,
                   int64_t slots, int64_t heads, int64_t kv_heads, int64_t width, int64_t capacity, int64_t window) {
    const int64_t group = heads / kv_heads, half = width / 2;
    const float scale = 1.0f / std::sqrt(float(width));
#pragma omp parallel
    {
        std::vector<float> room(2 * group * width + width + group * capacity);
        float *q = room.data(), *mixed = q + group * width, *k = mixed + group * width, *score = k + width;
#pragma omp for collapse(2) schedule(static)
        for (int64_t slot = 0; slot < slots; slot++)
            for (int64_t kv = 0; kv < kv_heads; kv++) {
                const int64_t at = length[slot], first = window > 0 && at >= window ? at - window + 1 : 0;
                const T *c = cos ? cos + slot * half : nullptr, *s = sin ? sin + slot * half : nullptr;
                const T* x = qkv + slot * (heads + 2 * kv_heads) * width;
                T* K = keys + (slot * kv_heads + kv) * capacity * width;
                T* V = values + (slot * kv_heads + kv) * capacity * width;
                turn(x + (heads + kv) * width, c, s, width, k);
                for (int64_t i = 0; i < width; i++) store(K + at / BLOCK * BLOCK * width + i * BLOCK + at % BLOCK, k[i]);
                std::memcpy(V + at * width, x + (heads + kv_heads + kv) * width, width * sizeof(T));
                for (int64_t g = 0; g < group; g++) {
                    turn(x + (kv * group + g) * width, c, s, width, q + g * width);
                    for (int64_t i = 0; i < width; i++) q[g * width + i] = rounded(x, q[g * width + i]) * scale;
                }
                for (int64_t g = 0, step; g < group; g += step) {
                    float *qg = q + g * width, *sg = score + g * capacity, *mg = mixed + g * width;
                    step = group - g < 4 ? group - g : 4;
                    auto one = step == 4 ? look<T, 4> : step == 3 ? look<T, 3> : step == 2 ? look<T, 2> : look<T, 1>;
                    one(qg, K, V, sg, mg, first, at, width, capacity);
                }
                T* place = out + (slot * heads + kv * group) * width;
                for (int64_t i = 0; i < group * width; i++) store(place + i, mixed[i]);
            }
    }
}

// -------------------------------------------------------------------------------------------- norms and activations

// x += y (where there is one), out = x / sqrt(mean(x^2) + eps) * weight; scale keeps 1 / sqrt(...) where it is asked for
template <class T>
static void add_norm(T* x, const T* y, const float* weight, T* out, float* scale, int64_t rows, int64_t width, float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        T *xr = x + r * width, *to = out + r * width;
        if (y) {
            const T* yr = y + r * width;
#pragma omp simd
            for (int64_t i = 0; i < width; i++) store(xr + i, wide(xr[i]) + wide(yr[i]));
        }
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++) sum += wide(xr[i]) * wide(xr[i]);
        const float s = 1.0f / std::sqrt(sum / float(width) + eps);
        if (scale) scale[r] = s;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) store(to + i, wide(xr[i]) * s * weight[i]);
    }
}

// dx = s (g - n mean(g n)), n = x s, g = dy weight; weight_part (parts, width): sum of dy n over each part's rows
template <class T>
static void norm_backward(const T* x, const T* dy, const float* weight, const float* scale, T* dx, float* weight_part,
                          int64_t rows, int64_t width, int64_t parts) {
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < parts; p++) {
        float* dw = weight_part + p * width;
        for (int64_t r = rows * p / parts; r < rows * (p + 1) / parts; r++) {
            const T *xr = x + r * width, *gr = dy + r * width;
            T* to = dx + r * width;
            const float s = scale[r];
            float dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < width; i++) {
                const float n = wide(xr[i]) * s, g = wide(gr[i]);
                dw[i] += g * n;
                dot += g * weight[i] * n;
            }
            const float mean = dot / float(width);
#pragma omp simd
            for (int64_t i = 0; i < width; i++)
                store(to + i, s * (wide(gr[i]) * weight[i] - wide(xr[i]) * s * mean));
        }
    }
}

// out = silu(gate) up; a row of gate or up begins `stride` numbers after the one before it
template <class T>
static void swiglu(const T* gate, const T* up, T* out, int64_t rows, int64_t width, int64_t stride) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++)
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            const float g = wide(gate[r * stride + i]);
            store(out + r * width + i, g / (1.0f + exponential(-g)) * wide(up[r * stride + i]));
        }
}

// dgate = dy up s (1 + gate (1 - s)), dup = dy gate s, s = sigmoid(gate)
template <class T>
static void swiglu_backward(const T* gate, const T* up, const T* dy, T* dgate, T* dup, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++)
#pragma omp simd
        for (int64_t i = r * width; i < (r + 1) * width; i++) {
            const float g = wide(gate[i]), d = wide(dy[i]), s = 1.0f / (1.0f + exponential(-g));
            store(dgate + i, d * wide(up[i]) * s * (1.0f + g * (1.0f - s)));
            store(dup + i, d * g * s);
        }
}

// ------------------------------------------------------------------------------------------------ training attention
// A row of `table` is a sequence: where its own tokens begin and how many they are, where its parent's begin and how many
// of those stand in front of it. Padded tensors are (sequences, heads, places, width); a place holds one token or zeros.

struct Sequence {
    int64_t start, length, parent, prefix;
};

template <class T>
static void turned(const T* x, const T* cos, const T* sin, int64_t width, float turn_by, T* out) {
    const int64_t half = width / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float a = wide(x[i]), b = wide(x[i + half]), c = wide(cos[i]), s = turn_by * wide(sin[i]);
        store(out + i, a * c - b * s);
        store(out + i + half, b * c + a * s);
    }
}

// x (N, heads, width) into padded places, turned by its positions where cos is there; with its parent's where keys != 0
template <class T>
static void pad(const T* x, const T* cos, const T* sin, const Sequence* table, T* out, int64_t sequences, int64_t heads,
                int64_t places, int64_t width, int64_t keys) {
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t b = 0; b < sequences; b++)
        for (int64_t h = 0; h < heads; h++) {
            const Sequence q = table[b];
            const int64_t prefix = keys ? q.prefix : 0, used = prefix + q.length;
            T* to = out + (b * heads + h) * places * width;
            for (int64_t i = 0; i < used; i++) {
                const int64_t n = i < prefix ? q.parent + i : q.start + i - prefix;
                const T* from = x + (n * heads + h) * width;
                if (cos) turned(from, cos + n * width / 2, sin + n * width / 2, width, 1.0f, to + i * width);
                else std::memcpy(to + i * width, from, width * sizeof(T));
            }
            std::memset((void*)(to + used * width), 0, (places - used) * width * sizeof(T));
        }
}

// The other way round, and the gradient of `pad`: each token gets the sum of all places that hold it, turned back. The
// children of sequence b are child[first_child[b]] to child[first_child[b + 1] - 1].
template <class T>
static void gather(const T* padded, const T* cos, const T* sin, const Sequence* table, const int64_t* first_child,
                   const int64_t* child, T* out, int64_t sequences, int64_t heads, int64_t places, int64_t width,
                   int64_t keys) {
#pragma omp parallel
    {
        std::vector<float> sum(width);
        std::vector<T> narrow(width);
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < sequences; b++)
            for (int64_t h = 0; h < heads; h++) {
                const Sequence q = table[b];
                const int64_t prefix = keys ? q.prefix : 0;
                for (int64_t i = 0; i < q.length; i++) {
                    const T* own = padded + ((b * heads + h) * places + prefix + i) * width;
                    const T* from = own;
                    if (keys && first_child[b + 1] > first_child[b]) {
                        for (int64_t d = 0; d < width; d++) sum[d] = wide(own[d]);
                        for (int64_t c = first_child[b]; c < first_child[b + 1]; c++) {
                            const T* more = padded + ((child[c] * heads + h) * places + i) * width;
#pragma omp simd
                            for (int64_t d = 0; d < width; d++) sum[d] += wide(more[d]);
                        }
                        for (int64_t d = 0; d < width; d++) store(&narrow[d], sum[d]);
                        from = narrow.data();
                    }
                    const int64_t n = q.start + i;
                    T* to = out + (n * heads + h) * width;
                    if (cos) turned(from, cos + n * width / 2, sin + n * width / 2, width, -1.0f, to);
                    else std::memcpy(to, from, width * sizeof(T));
                }
            }
    }
}

// scores (sequences, rows, keys), in place: causal softmax(scale x) over what a row may see, zeros elsewhere. Row r is
// that of query r % queries.  With weights there, instead: the gradient of the scores, from that of the weights.
template <class T>
static void causal_softmax(T* scores, const T* weights, const Sequence* table, int64_t sequences, int64_t rows,
                           int64_t queries, int64_t keys, int64_t window, float scale) {
#pragma omp parallel
    {
        std::vector<float> line(keys);
        float* x = line.data();
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < sequences; b++)
            for (int64_t r = 0; r < rows; r++) {
                const int64_t query = r % queries, at = table[b].prefix + query;
                const int64_t first = window > 0 && at >= window ? at - window + 1 : 0;
                T* row = scores + (b * rows + r) * keys;
                if (query >= table[b].length) {
                    std::memset((void*)row, 0, keys * sizeof(T));
                    continue;
                }
                if (weights) {
                    const T* w = weights + (b * rows + r) * keys;
                    float dot = 0;
#pragma omp simd reduction(+ : dot)
                    for (int64_t j = first; j <= at; j++) dot += wide(row[j]) * wide(w[j]);
#pragma omp simd
                    for (int64_t j = first; j <= at; j++) store(row + j, (wide(row[j]) - dot) * wide(w[j]) * scale);
                } else {
#pragma omp simd
                    for (int64_t j = first; j <= at; j++) x[j] = wide(row[j]) * scale;
                    softmax(x, first, at);
#pragma omp simd
                    for (int64_t j = first; j <= at; j++) store(row + j, x[j]);
                }
                std::memset((void*)row, 0, first * sizeof(T));
                std::memset((void*)(row + at + 1), 0, (keys - at - 1) * sizeof(T));
            }
    }
}

// --------------------------------------------------------------------------------------- rows of logits, never stored

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

// In place of the logits: what the loss gains by each of them. dlogp/dz = onehot - p, dentropy/dz = -p (log p + entropy)
template <class T>
static void token_gradient(T* logits, const int64_t* target, const float* entropy, const float* norm,
                           const float* grad_logp, const float* grad_entropy, int64_t rows, int64_t vocabulary,
                           float temperature) {
    const float cold = 1.0f / temperature;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        T* row = logits + r * vocabulary;
        const float lse = norm[r], gl = grad_logp ? grad_logp[r] : 0.0f, ge = grad_entropy ? grad_entropy[r] : 0.0f;
        const float chosen = wide(row[target[r]]) * cold - lse, shift = entropy[r];
#pragma omp simd
        for (int64_t v = 0; v < vocabulary; v++) {
            const float log_p = wide(row[v]) * cold - lse, p = exponential(log_p);
            const float pull = gl + (log_p < -87.0f ? 0.0f : ge * (log_p + shift));
            store(row + v, -p * pull * cold);
        }
        const float p = exponential(chosen);
        store(row + target[r], (gl - p * (gl + ge * (chosen + shift))) * cold);
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

#define EXPORT(T, name)                                                                                                \
    void attend_##name(const T* qkv, const T* cos, const T* sin, T* keys, T* values, const int64_t* length, T* out,    \
                       int64_t slots, int64_t heads, int64_t kv_heads, int64_t width, int64_t capacity,                \
                       int64_t window) {                                                                               \
        attend(qkv, cos, sin, keys, values, length, out, slots, heads, kv_heads, width, capacity, window);             \
    }                                                                                                                  \
    void add_norm_##name(T* x, const T* y, const float* weight, T* out, float* scale, int64_t rows, int64_t width,     \
                         float eps) {                                                                                  \
        add_norm(x, y, weight, out, scale, rows, width, eps);                                                          \
    }                                                                                                                  \
    void norm_backward_##name(const T* x, const T* dy, const float* weight, const float* scale, T* dx,                 \
                              float* weight_part, int64_t rows, int64_t width, int64_t parts) {                        \
        norm_backward(x, dy, weight, scale, dx, weight_part, rows, width, parts);                                      \
    }                                                                                                                  \
    void swiglu_##name(const T* gate, const T* up, T* out, int64_t rows, int64_t width, int64_t stride) {              \
        swiglu(gate, up, out, rows, width, stride);                                                                    \
    }                                                                                                                  \
    void swiglu_backward_##name(const T* gate, const T* up, const T* dy, T* dgate, T* dup, int64_t rows,               \
                                int64_t width) {                                                                       \
        swiglu_backward(gate, up, dy, dgate, dup, rows, width);                                                        \
    }                                                                                                                  \
    void token_stats_##name(const T* logits, const int64_t* target, float* logp, float* entropy, float* norm,          \
                            int64_t rows, int64_t vocabulary, float temperature) {                                     \
        token_stats(logits, target, logp, entropy, norm, rows, vocabulary, temperature);                               \
    }                                                                                                                  \
    void token_gradient_##name(T* logits, const int64_t* target, const float* entropy, const float* norm,              \
                               const float* grad_logp, const float* grad_entropy, int64_t rows, int64_t vocabulary,    \
                               float temperature) {                                                                    \
        token_gradient(logits, target, entropy, norm, grad_logp, grad_entropy, rows, vocabulary, temperature);         \
    }                                                                                                                  \
    void pad_##name(const T* x, const T* cos, const T* sin, const Sequence* table, T* out, int64_t sequences,           \
                    int64_t heads, int64_t places, int64_t width, int64_t keys) {                                       \
        pad(x, cos, sin, table, out, sequences, heads, places, width, keys);                                           \
    }                                                                                                                  \
    void gather_##name(const T* padded, const T* cos, const T* sin, const Sequence* table, const int64_t* first_child, \
                       const int64_t* child, T* out, int64_t sequences, int64_t heads, int64_t places, int64_t width,  \
                       int64_t keys) {                                                                                 \
        gather(padded, cos, sin, table, first_child, child, out, sequences, heads, places, width, keys);               \
    }                                                                                                                  \
    void causal_softmax_##name(T* scores, const T* weights, const Sequence* table, int64_t sequences, int64_t rows,    \
                               int64_t queries, int64_t keys, int64_t window, float scale) {                           \
        causal_softmax(scores, weights, table, sequences, rows, queries, keys, window, scale);                         \
    }                                                                                                                  \
    void choose_##name(const T* logits, const float* temperature, const double* uniform, int64_t* id, float* logp,     \
                       int64_t rows, int64_t vocabulary, int64_t valid) {                                              \
        choose(logits, temperature, uniform, id, logp, rows, vocabulary, valid);                                       \
    }

extern "C" {
EXPORT(float, f32)
EXPORT(bf16, bf16)
void discounted_sums_f32(const float* x, const int64_t* starts, const float* tail, float* y, int64_t episodes, float decay) {
    discounted_sums(x, starts, tail, y, episodes, decay);
}
}
