// Launchers of the covariance kernels. No torch.
#pragma once

#include "../launch.h"
#include "../planner.h"
#include "arguments.h"

namespace lowrank_ops::covariance {

void launch_sm80(const CovariancePlan& plan, const Arguments& arguments, Dtype dtype, Source source,
                 const Launch& launch);

// Needs code for sm_90a, Source::aligned_matrix and a 16-bit dtype.
void launch_sm90(const CovariancePlan& plan, const Arguments& arguments, Dtype dtype, const Launch& launch);

// The same, with tiles of 256 x 256.
void launch_sm90_wide(const CovariancePlan& plan, const Arguments& arguments, Dtype dtype, const Launch& launch);

// Reduces the partial tiles of split tiles, of `edge` rows and columns.
void launch_add_partials(const Arguments& arguments, int edge, const Launch& launch);

}  // namespace lowrank_ops::covariance
