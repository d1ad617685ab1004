// The CPU operators: allocation, threads, and the choice of the instruction set.
#include <algorithm>
#include <functional>
#include <memory>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../ops.h"
#include "kernels.h"

namespace frozen_bn::cpu {
namespace {

// at::parallel_for's own grain size: below it, starting threads costs more than they bring.
constexpr int64_t kGrainElements = 32768;

// From here on an output and its input do not fit a cache of 32 MB together. Measured there: half
// the time of cached stores at 24 MB, but twice at 6 MB, where the next layer finds the output.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

// Fresh memory of this size is mapped anew by the allocator, and faults page by page.
constexpr int64_t kHugePageBytes = int64_t{2} << 20;

int64_t bytes_of(const Tensor& t) {
  return t.numel() * static_cast<int64_t>(t.element_size());
}

// Asks for huge pages under a tensor that is about to be written whole: with 4 KiB pages, the
// page faults of a fresh 128 MB output cost several times the arithmetic.
void advise_huge_pages(const Tensor& t) {
#if defined(__linux__)
  const auto begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t first = (begin + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  const uintptr_t last = (begin + bytes_of(t)) / kHugePageBytes * kHugePageBytes;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

bool should_stream(const Tensor& output) {
  return bytes_of(output) >= kStreamBytes &&
         reinterpret_cast<uintptr_t>(output.data_ptr()) % 64 == 0;
}

int64_t range_count(int64_t numel) {
  return std::min<int64_t>(torch::stable::get_num_threads(), ceil_div(numel, kGrainElements));
}

// Splits the elements into one range a thread and calls f(range, begin, end). The ranges depend
// on nothing but the size and the number of threads, so sums over them are repeatable.
template <class F>
void for_each_range(int64_t numel, F f) {
  if (numel == 0) return;
  const int64_t ranges = range_count(numel);
  const int64_t units = ceil_div(numel, kRangeAlignment);
  const auto start = [&](int64_t range) {
    return std::min(numel, units * range / ranges * kRangeAlignment);
  };
  if (ranges == 1) return f(0, 0, numel);
  torch::stable::parallel_for(0, ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t range = begin; range < end; ++range) f(range, start(range), start(range + 1));
  });
}

template <class T>
void read_vector(const OptionalTensor& t, double missing, int64_t channels, T* row) {
  if (!t) {
    std::fill_n(row, channels, static_cast<T>(missing));
    return;
  }
  const auto convert = [&](const auto* values) {
    std::transform(values, values + channels, row, [](auto v) { return static_cast<T>(v); });
  };
  switch (t->scalar_type()) {
    case ScalarType::Half: return convert(t->const_data_ptr<torch::headeronly::Half>());
    case ScalarType::BFloat16: return convert(t->const_data_ptr<torch::headeronly::BFloat16>());
    case ScalarType::Double: return convert(t->const_data_ptr<double>());
    default: return convert(t->const_data_ptr<float>());
  }
}

// Uninitialised memory that a pack never straddles a cache line of.
template <class T>
class AlignedArray {
 public:
  explicit AlignedArray(int64_t size) : data_(new (kLine) T[size]) {}
  T* get() const {
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Delete {
    void operator()(T* data) const {
      operator delete[](data, kLine);
    }
  };
  std::unique_ptr<T[], Delete> data_;
};

// One branch's, [channels] each.
template <class T>
struct BranchRows {
  T *mean, *scale, *bias, *inv_std;
};

template <class T>
void compute_coefficients(
    const Statistics& s, Dtype dtype, int64_t channels, const BranchRows<T>& rows) {
  const auto scratch = std::make_unique_for_overwrite<double[]>(2 * channels);
  double *var = scratch.get(), *weight = var + channels;
  read_vector(s.mean, 0, channels, rows.mean);
  read_vector(s.bias, 0, channels, rows.bias);
  read_vector(s.var, 0, channels, var);
  read_vector(s.weight, 1, channels, weight);
  kernels(dtype).coefficients(dtype, {var, weight, rows.scale, rows.inv_std, channels, s.eps});
}

// rows: [kRows, channels], or [kPairRows, channels]
template <class T>
void compute_coefficients(const ForwardArguments& a, int64_t channels, T* rows) {
  const auto row = [&](int64_t number) { return rows + number * channels; };
  const Dtype dtype = dtype_of(a.input);
  if (!a.residual_statistics) {
    const BranchRows<T> all{row(kMean), row(kScale), row(kBias), row(kInvStd)};
    return compute_coefficients(a.statistics, dtype, channels, all);
  }
  const auto scratch = std::make_unique_for_overwrite<T[]>(2 * channels);
  T *bias = scratch.get(), *unused = bias + channels;
  compute_coefficients<T>(
      a.statistics, dtype, channels, {row(kMean), row(kScale), row(kBias), unused});
  compute_coefficients<T>(
      *a.residual_statistics, dtype, channels,
      {row(kResidualMean), row(kResidualScale), bias, unused});
  std::transform(bias, bias + channels, row(kBias), row(kBias), std::plus<T>{});
}

// How often the coefficients repeat along the storage, in elements; 0 where the kernels take them
// straight from the rows. A short period is repeated until it is a multiple of the pack, and a
// large tensor is not slowed down by starting over all the time.
int64_t spread_period(const Layout& layout) {
  if (layout.inner >= kMinInner || layout.numel == 0) return 0;
  constexpr int64_t kLongestRepeated = 4096;
  const int64_t short_period = std::clamp(layout.numel / 64, 4 * kMaxLanes, 64 * kMaxLanes);
  const int64_t period = layout.inner * layout.channels;
  int64_t repeated = std::lcm(period, kMaxLanes);
  if (repeated > kLongestRepeated) return period;
  while (repeated < short_period) repeated *= 2;
  return repeated;
}

// Coefficients as the kernels want them; owns what it had to spread.
template <class T>
class KernelCoefficients {
 public:
  KernelCoefficients(const T* rows, bool pair, const Layout& layout)
      : view_{{}, pair, spread_period(layout)},
        stride_(view_.period + kMaxLanes),
        spread_(view_.period ? row_count(pair) * stride_ : 0) {
    for (int64_t number = 0; number < row_count(pair); ++number) {
      const T* row = rows + number * layout.channels;
      view_.row[number] =
          view_.period ? spread(row, layout, spread_.get() + number * stride_) : row;
    }
  }

  const Coefficients& view() const {
    return view_;
  }

 private:
  // One round of the channels, as often as it fits.
  const T* spread(const T* row, const Layout& layout, T* to) const {
    const int64_t round = layout.inner * layout.channels;
    if (layout.inner == 1) {
      std::copy_n(row, round, to);
    } else {
      // Each channel is written kMinInner times, which takes no loop (and stays within stride_);
      // the next one begins after `inner`.
      T* out = to;
      for (int64_t c = 0; c < layout.channels; ++c, out += layout.inner) {
        const T value = row[c];
        for (int64_t k = 0; k < kMinInner; ++k) out[k] = value;
      }
    }
    for (int64_t done = round; done < stride_; done *= 2) {
      std::copy_n(to, std::min(done, stride_ - done), to + done);
    }
    return to;
  }

  Coefficients view_;
  int64_t stride_;
  AlignedArray<T> spread_;
};

template <class F>
auto with_arithmetic_type(const Tensor& t, F f) {
  return t.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

void run_forward(const ForwardArguments& a, const Layout& layout) {
  const bool in_place = a.output.data_ptr() == a.input.data_ptr();
  const bool pair = a.residual_statistics.has_value();
  const Dtype dtype = dtype_of(a.input);
  if (!in_place) advise_huge_pages(a.output);
  with_arithmetic_type(a.input, [&](auto zero) {
    using T = decltype(zero);
    const auto unsaved = std::make_unique_for_overwrite<T[]>(
        a.coefficients ? 0 : std::max<int64_t>(kRows, kPairRows) * layout.channels);
    T* rows = a.coefficients ? static_cast<T*>(a.coefficients->data_ptr()) : unsaved.get();
    compute_coefficients(a, layout.channels, rows);
    if (layout.numel == 0) return;
    const KernelCoefficients<T> coefficients(rows, pair, layout);
    const ForwardParams params{
        a.input.data_ptr(),
        data_or_null(a.residual),
        a.output.data_ptr(),
        static_cast<uint8_t*>(data_or_null(a.mask)),
        layout,
        coefficients.view(),
        a.activation,
        a.negative_slope,
        !in_place && should_stream(a.output)};
    for_each_range(layout.numel, [&](int64_t, int64_t begin, int64_t end) {
      kernels(dtype).forward(dtype, params, begin, end);
    });
  });
}

// One ChannelSums a range, and their total: kept apart while threads run, added in order after.
class RangeSums {
 public:
  RangeSums(int64_t ranges, int64_t channels, int64_t period)
      : channels_(channels),
        sums_(ranges * 2 * channels),
        spread_stride_(period ? 2 * (period + kMaxLanes) : 0),
        spread_(ranges * 2 * spread_stride_) {
    std::fill_n(spread_.get(), ranges * 2 * spread_stride_, 0.0);
  }

  ChannelSums of(int64_t range) {
    double* g = sums_.data() + range * 2 * channels_;
    double* spread = spread_.get() + range * 2 * spread_stride_;
    return {g, g + channels_, spread, spread + spread_stride_};
  }

  // Leaves the total in range 0.
  ChannelSums add_up() {
    const int64_t width = 2 * channels_;
    for (size_t i = width; i < sums_.size(); ++i) sums_[i % width] += sums_[i];
    return of(0);
  }

 private:
  int64_t channels_;
  std::vector<double> sums_;
  int64_t spread_stride_;
  AlignedArray<double> spread_;
};

void write_vector(const std::vector<double>& values, const Tensor& t) {
  const auto convert = [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    std::transform(values.begin(), values.end(), to, [](double v) { return static_cast<T>(v); });
  };
  switch (t.scalar_type()) {
    case ScalarType::Half: return convert(t.mutable_data_ptr<torch::headeronly::Half>());
    case ScalarType::BFloat16: return convert(t.mutable_data_ptr<torch::headeronly::BFloat16>());
    case ScalarType::Double: return convert(t.mutable_data_ptr<double>());
    default: return convert(t.mutable_data_ptr<float>());
  }
}

template <class T>
void write_affine_gradients(
    const BackwardArguments& a, const ChannelSums& total, int64_t channels) {
  const T* inv_std = static_cast<const T*>(a.coefficients.data_ptr()) + kInvStd * channels;
  std::vector<double> row(total.g, total.g + channels);
  if (a.grad_bias) write_vector(row, *a.grad_bias);
  for (int64_t c = 0; c < channels; ++c) row[c] = total.g_centered[c] * inv_std[c];
  if (a.grad_weight) write_vector(row, *a.grad_weight);
}

void run_backward(const BackwardArguments& a, const Layout& layout) {
  const Dtype dtype = dtype_of(a.grad_output);
  bool stream = true;
  for (const OptionalTensor& output : {a.grad_input, a.grad_residual}) {
    if (!output) continue;
    advise_huge_pages(*output);
    stream = stream && should_stream(*output);
  }
  const bool wants_sums = a.grad_weight || a.grad_bias;
  with_arithmetic_type(a.grad_output, [&](auto zero) {
    using T = decltype(zero);
    const KernelCoefficients<T> coefficients(
        static_cast<const T*>(a.coefficients.data_ptr()), a.pair(), layout);
    const BackwardParams params{
        a.grad_output.data_ptr(),
        static_cast<const uint8_t*>(data_or_null(a.mask)),
        needs_input(a.activation) || a.grad_weight ? data_or_null(a.input) : nullptr,
        data_or_null(a.residual),
        data_or_null(a.grad_input),
        data_or_null(a.grad_residual),
        layout,
        coefficients.view(),
        a.activation,
        a.negative_slope,
        stream};
    RangeSums sums(
        wants_sums ? std::max<int64_t>(range_count(layout.numel), 1) : 0, layout.channels,
        params.coefficients.period);
    for_each_range(layout.numel, [&](int64_t range, int64_t begin, int64_t end) {
      const ChannelSums of_range = wants_sums ? sums.of(range) : ChannelSums{};
      kernels(dtype).backward(dtype, params, begin, end, of_range);
    });
    if (wants_sums) write_affine_gradients<T>(a, sums.add_up(), layout.channels);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(frozen_bn, CPU, library) {
  Operators<run_forward, run_backward>::register_in(library);
}

}  // namespace frozen_bn::cpu
