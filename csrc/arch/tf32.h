#pragma once

namespace lowrank_ops::arch {

// Operand type of MMAs: float32, of which tensor cores ignore the last 13 bits.
struct Tf32;

}  // namespace lowrank_ops::arch
