/* One training step written by hand, the floor of what a step can cost: mean bags, a linear head, the logistic loss,
   coalescing, and Adam on the distinct rows and the head. It checks nothing. Two threads. */
#include <math.h>
#include <omp.h>
#include <string.h>

typedef struct {
    float lr, b1, b2, eps;
} Rates; /* corrected for bias: lr sqrt(1 - b2^t) / (1 - b1^t), eps sqrt(1 - b2^t) */

static inline void adam(Rates r, int n, float *restrict p, float *restrict m, float *restrict v,
                        const float *restrict g) {
    for (int k = 0; k < n; k++) {
        float mk = r.b1 * m[k] + (1 - r.b1) * g[k], vk = r.b2 * v[k] + (1 - r.b2) * g[k] * g[k];
        m[k] = mk;
        v[k] = vk;
        p[k] -= r.lr * mk / (sqrtf(vk) + r.eps);
    }
}

/* tables: parameter, m and v, (num_rows, DIM) each; heads: the same, (DIM) each; scratch: (num_rows) of anything;
   g: (batch, DIM); sums: (batch * length, DIM); distinct, slot: (batch * length). Returns the loss. */
float step(int batch, int length, Rates rates, const int *ids, const float *labels, float *const *tables,
           float *const *heads, int *scratch, float *g, float *sums, int *distinct, int *slot) {
    float *table = tables[0], *head = heads[0], head_grad[DIM] = {0}, loss = 0;
    int total = batch * length, found = 0;
#pragma omp parallel for schedule(static) reduction(+ : loss, head_grad) num_threads(2)
    for (int b = 0; b < batch; b++) {
        float x[DIM] = {0}, z = 0;
        for (int l = 0; l < length; l++) {
            const float *row = table + (long)ids[b * length + l] * DIM;
            for (int k = 0; k < DIM; k++) x[k] += row[k];
        }
        for (int k = 0; k < DIM; k++) z += (x[k] /= length) * head[k];
        float error = (1 / (1 + expf(-z)) - labels[b]) / batch;
        loss += (fmaxf(z, 0) - z * labels[b] + log1pf(expf(-fabsf(z)))) / batch;
        for (int k = 0; k < DIM; k++) {
            head_grad[k] += error * x[k];
            g[(long)b * DIM + k] = error * head[k] / length;
        }
    }
    for (int i = 0; i < total; i++) {
        int s = scratch[ids[i]];
        if (s < 0 || s >= found || distinct[s] != ids[i]) {
            s = scratch[ids[i]] = found++;
            distinct[s] = ids[i];
        }
        slot[i] = s;
    }
#pragma omp parallel num_threads(2)
    {
        int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        int low = (long)found * thread / threads, high = (long)found * (thread + 1) / threads;
        memset(sums + (long)low * DIM, 0, (long)(high - low) * DIM * sizeof(float));
        for (int i = 0; i < total; i++) {
            if (slot[i] < low || slot[i] >= high) continue;
            float *sum = sums + (long)slot[i] * DIM, *from = g + (long)(i / length) * DIM;
            for (int k = 0; k < DIM; k++) sum[k] += from[k];
        }
        for (int s = low; s < high; s++) {
            long at = (long)distinct[s] * DIM;
            adam(rates, DIM, tables[0] + at, tables[1] + at, tables[2] + at, sums + (long)s * DIM);
        }
    }
    adam(rates, DIM, heads[0], heads[1], heads[2], head_grad);
    return loss;
}
