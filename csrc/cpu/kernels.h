// The C++ functions that ops.cpp registers, by op.
#pragma once

#include <tuple>
#include <vector>

#include "rows.h"

namespace hypersd {

Tensor affine_step(Tensor x, Tensor eps_cond, Tensor coef, std::optional<Tensor> eps_uncond,
                   std::optional<Tensor> history, std::optional<Tensor> noise);
std::vector<Tensor> affine_step_backward(Tensor grad, Tensor coef, int64_t needed);

std::tuple<Tensor, Tensor> consistency_loss(Tensor eps_student, Tensor x_t, Tensor eps_target, Tensor x_s, Tensor coef,
                                            std::optional<Tensor> weight, int64_t kind, double c, bool mean,
                                            bool with_slope);
Tensor consistency_loss_backward(Tensor slope, Tensor upstream, std::optional<Tensor> weight);

}  // namespace hypersd
