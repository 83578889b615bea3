// The C++ functions that ops.cpp registers, by op.
#pragma once

#include <tuple>
#include <vector>

#include "rows.h"

namespace hypersd {

Tensor affine_step(Tensor x, Tensor eps_cond, Tensor coef, std::optional<Tensor> eps_uncond,
                   std::optional<Tensor> history, std::optional<Tensor> noise);
std::vector<Tensor> affine_step_backward(Tensor grad, Tensor coef, int64_t needed);

Tensor attention(Tensor q, Tensor k, Tensor v, std::optional<double> scale);
std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v,
                                                      std::optional<double> scale);

std::tuple<Tensor, Tensor> consistency_loss(Tensor eps_student, Tensor x_t, Tensor eps_target, Tensor x_s, Tensor coef,
                                            std::optional<Tensor> weight, int64_t kind, double c, bool mean,
                                            bool with_slope);
Tensor consistency_loss_backward(Tensor slope, Tensor upstream, std::optional<Tensor> weight);

void adamw_ema_(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor ema, double step, double lr,
                double beta1, double beta2, double eps, double weight_decay, double ema_decay,
                std::optional<Tensor> shadow, std::optional<Tensor> clip, std::optional<Tensor> step_tensor,
                std::optional<Tensor> lr_tensor);
std::tuple<Tensor, Tensor> clip_coefficient(Tensor grad, double max_norm);

Tensor geglu(Tensor x);
Tensor geglu_backward(Tensor dy, Tensor x);

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_silu(Tensor x, int64_t num_groups, std::optional<Tensor> weight,
                                                           std::optional<Tensor> bias, double eps, bool silu,
                                                           std::optional<Tensor> shift,
                                                           std::optional<Tensor> residual);
std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd,
                                                            std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                            int64_t num_groups, bool silu, bool need_x,
                                                            bool need_affine, std::optional<Tensor> shift,
                                                            std::optional<Tensor> dh);

int64_t lora_rows_dtypes();
std::tuple<Tensor, Tensor> lora_rows(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor a, Tensor b,
                                     double scale, int64_t sh, int64_t sw, int64_t ph, int64_t pw, bool keep,
                                     bool fold);
std::tuple<Tensor, Tensor, Tensor> lora_rows_backward(Tensor dy, Tensor x, Tensor s, Tensor weight, Tensor a, Tensor b,
                                                      double scale, int64_t sh, int64_t sw, int64_t ph, int64_t pw,
                                                      bool need_x, bool need_adapter);

Tensor score_gradient(Tensor x, Tensor x_real, Tensor x_fake, std::optional<Tensor> weight);

}  // namespace hypersd
