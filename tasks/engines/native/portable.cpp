// The kernels for any processor, in whatever vectors of 16 bytes it has.
#include "matrix.h"
#define WIDTH 4

namespace {

using Vector = float __attribute__((vector_size(WIDTH * 4)));

template <class E>
Vector widen(const uint8_t* values) {
  Vector wide = {};
  for (int lane = 0; lane < WIDTH; ++lane) {
    E value;
    memcpy(&value, values + lane * sizeof(E), sizeof value);
    wide[lane] = to_float(value);
  }
  return wide;
}

float sum(Vector vector) {
  float total = 0;
  for (int lane = 0; lane < WIDTH; ++lane) total += vector[lane];
  return total;
}

template <class E>
struct Spread {
  static constexpr int STEP = WIDTH;

  static void copy(const uint8_t* values, size_t mask, E* to) {
    for (int lane = 0; lane < WIDTH; ++lane) {
      E value;
      memcpy(&value, values, sizeof value);
      const unsigned here = (mask >> lane) & 1;
      to[lane] = here ? value : E(0);
      values += here * sizeof(E);
    }
  }

  static void floats(const uint8_t* values, size_t mask, Vector* to) {
    E spread[WIDTH];
    copy(values, mask, spread);
    for (int lane = 0; lane < WIDTH; ++lane) (*to)[lane] = to_float(spread[lane]);
  }
};

void list_columns(uint64_t mask, uint8_t* columns) {
  for (int column = 0; column < BLOCK; ++column) {
    *columns = uint8_t(column);
    columns += (mask >> column) & 1;
  }
}

}  // namespace

#include "kernels.h"
const Kernels portable_kernels = KERNELS;
