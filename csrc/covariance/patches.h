// Implicit im2col: the element of an image at (token, feature) of the patch matrix.
#pragma once

#include "../host_device.h"

namespace lowrank_ops::covariance {

struct Patches {
  int channels;  // per group
  int height, width;
  int kernel_height, kernel_width;
  int out_height, out_width;
  int stride_y, stride_x;
  int padding_y, padding_x;
  int dilation_y, dilation_x;
  int64_t image_stride, channel_stride, row_stride, col_stride;  // elements
};

LRO_HD constexpr int output_length(int length, int kernel, int stride, int padding, int dilation) {
  return (length + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

// A token is an output position. Its offset is that of the patch's corner, which padding may put outside.
struct PatchToken {
  int64_t offset;
  int y, x;
};

// A feature is (channel, kernel row, kernel column), the order of a flattened Conv2d weight.
struct PatchFeature {
  int64_t offset;
  int y, x;
};

LRO_HD PatchToken patch_token(const Patches& p, uint32_t token) {
  uint32_t positions = static_cast<uint32_t>(p.out_height) * p.out_width;
  uint32_t image = token / positions, position = token % positions;
  int y = static_cast<int>(position / p.out_width) * p.stride_y - p.padding_y;
  int x = static_cast<int>(position % p.out_width) * p.stride_x - p.padding_x;
  return {image * p.image_stride + y * p.row_stride + x * p.col_stride, y, x};
}

LRO_HD PatchFeature patch_feature(const Patches& p, int feature) {
  int area = p.kernel_height * p.kernel_width;
  int y = feature % area / p.kernel_width * p.dilation_y;
  int x = feature % p.kernel_width * p.dilation_x;
  return {feature / area * p.channel_stride + y * p.row_stride + x * p.col_stride, y, x};
}

// Padding reads as zero.
LRO_HD bool inside(const Patches& p, const PatchToken& token, const PatchFeature& feature) {
  int y = token.y + feature.y, x = token.x + feature.x;
  return y >= 0 && y < p.height && x >= 0 && x < p.width;
}

}  // namespace lowrank_ops::covariance
