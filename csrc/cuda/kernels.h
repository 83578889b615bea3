// The launches that ops.cpp calls, by op. Pointers are those of the device, `stream` is a cudaStream_t.
#pragma once

#include "common.h"

namespace hypersd {

struct AffineStep {
  const void* in[5];  // null: not given
  Type type[5];
  void* out;
  Type out_type;
  const void* coef;  // null: the numbers in `host`
  Type coef_type;
  int64_t coef_stride;
  float host[5];
  int64_t rows, width;
};
void affine_step(const AffineStep& p, void* stream);

struct ConsistencyLoss {
  const void* in[4];  // eps_student, x_t, eps_target, x_s
  Type type[4];
  const void *coef, *weight;  // weight null: ones
  Type coef_type, weight_type;
  int64_t coef_stride;
  int64_t kind;
  float c;
  void* slope;  // null: not wanted; else of the type of eps_student
  float* loss;
  float* partial;  // consistency_partials() numbers
  bool mean;
  int64_t rows, width;
};
int64_t consistency_partials(const ConsistencyLoss& p);
void consistency_loss(const ConsistencyLoss& p, void* stream);

struct ConsistencyScale {
  const void *slope, *upstream, *weight;  // weight null: ones
  Type type, upstream_type, weight_type;
  int64_t upstream_stride, weight_stride;
  float inverse_count;
  void* out;
  int64_t rows, width;
};
void consistency_loss_backward(const ConsistencyScale& p, void* stream);

struct AdamwEma {
  float *param, *exp_avg, *exp_avg_sq, *ema;
  const void *grad, *clip, *step_tensor, *lr_tensor;  // the last three null: `step` and `lr` alone, no clip
  Type grad_type, clip_type, step_type, lr_type;
  void* shadow;  // null: not wanted
  Type shadow_type;
  double step, lr, log_beta1, log_beta2;
  float weight1, weight2, eps, weight_decay, weight_ema;
  float decay, step_size, root2;  // of numbers on the host
  int64_t count;
};
void adamw_ema_(const AdamwEma& p, void* stream);

struct GroupNorm {
  const void *x, *dy, *weight, *bias;  // dy of the type of x; weight and bias null: 1 and 0
  const void* shift;                   // (batch, channels), added to x; null: nothing
  const void* residual;                // forward: h = x + residual, rounded, stands for x; null: x itself does
  void* h;
  const void* dh;                      // backward: added to dx; null: nothing. All three of the type of x
  Type type, weight_type, bias_type, shift_type;
  void* out;  // y or dx
  float *mean, *rstd;
  float *level, *tilt;     // backward, (batch, groups): dx = rstd weight dz - ((x + shift - mean) tilt + level)
  float* partial;          // GroupNormPlan::partials() numbers
  void *dweight, *dbias;   // of the types of weight and bias
  int64_t batch;
  int channels, groups, pixels;
  float eps;
  bool silu, inside;       // inside: channels are the innermost dimension of memory

  // How blocks cut it up: a slot is what one thread moves at a time, N numbers of the innermost dimension.
  int lanes, per_slot;                 // channels of a slot and pixels of a slot: one of the two is N, the other 1
  int channel_slots, pixel_slots;      // of a sample
  int slab, slabs;                     // channel slots of a block, slabs of a sample
  int chunk, chunks;                   // pixel slots of a block, chunks of a slab
  int channel_threads, pixel_threads;  // of a block
};
struct GroupNormPlan {
  GroupNorm p;
  bool wide;
  bool one_pass;  // the chunks of a slab are a cluster, which holds its part of x in shared memory
  int threads;
  int64_t shared;  // bytes a block
  int64_t partials() const { return one_pass ? 0 : p.batch * p.chunks * 2 * p.channels; }
};
GroupNormPlan plan_group_norm(GroupNorm p, const Device& device, bool forward);
void group_norm_silu(const GroupNormPlan& plan, void* stream);
void group_norm_silu_backward(const GroupNormPlan& plan, void* stream);

}  // namespace hypersd
