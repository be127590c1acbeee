#pragma once

namespace lowrank_ops::arch {

// An operand type: float32 whose last 13 bits the tensor cores ignore.
struct Tf32;

}  // namespace lowrank_ops::arch
