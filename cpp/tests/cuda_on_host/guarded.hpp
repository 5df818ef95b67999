// Arrays for kernels under test: flush against pages that cannot be touched, outputs poisoned.
#ifndef SUBQUAD_CUDA_ON_HOST_GUARDED_HPP
#define SUBQUAD_CUDA_ON_HOST_GUARDED_HPP

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "subquad/array_view.hpp"

namespace subquad::cuda::on_host {

inline constexpr unsigned char kPoison = 0xff;

// Memory between two pages that cannot be touched: whole pages, at least `bytes`.
class guarded_memory {
 public:
  explicit guarded_memory(std::size_t bytes) : page_(page_size()) {
    inner_ = (bytes + page_ - 1) / page_ * page_;
    if (inner_ == 0) inner_ = page_;
    void* base = mmap(nullptr, inner_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<unsigned char*>(base);
    if (mprotect(begin(), inner_, PROT_READ | PROT_WRITE) != 0) {
      munmap(base_, inner_ + 2 * page_);
      throw std::bad_alloc();
    }
  }
  ~guarded_memory() { munmap(base_, inner_ + 2 * page_); }
  guarded_memory(const guarded_memory&) = delete;
  guarded_memory& operator=(const guarded_memory&) = delete;

  unsigned char* begin() const { return base_ + page_; }
  unsigned char* end() const { return begin() + inner_; }
  std::size_t size() const { return inner_; }
  bool holds(const void* address) const {
    return address >= base_ && address < base_ + inner_ + 2 * page_;
  }

  static std::size_t page_size() {
    static const auto size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    return size;
  }

 private:
  std::size_t page_;
  std::size_t inner_;
  unsigned char* base_;
};

// Part of a guarded memory in use. What lies between it and the pages is poison, so that a write to
// it shows later (a read gives poison).
struct guarded_part {
  const guarded_memory* memory = nullptr;
  unsigned char* data = nullptr;
  std::size_t bytes = 0;

  void poison_surroundings() const {
    std::memset(memory->begin(), kPoison, static_cast<std::size_t>(data - memory->begin()));
    std::memset(data + bytes, kPoison, static_cast<std::size_t>(memory->end() - (data + bytes)));
  }

  static constexpr std::ptrdiff_t kNothing = PTRDIFF_MIN;
  // Where, in bytes from `data`, something wrote around it, or kNothing.
  std::ptrdiff_t written_outside() const {
    const unsigned char* below = first_written(memory->begin(), data);
    if (below != data) return below - data;
    const unsigned char* above = first_written(data + bytes, memory->end());
    return above != memory->end() ? above - data : kNothing;
  }

 private:
  static const unsigned char* first_written(const unsigned char* begin, const unsigned char* end) {
    // What is there usually, told at once: every byte is as the one before it.
    const auto size = static_cast<std::size_t>(end - begin);
    if (size == 0 || (*begin == kPoison && std::memcmp(begin, begin + 1, size - 1) == 0))
      return end;
    return std::find_if(begin, end, [](unsigned char byte) { return byte != kPoison; });
  }
};

// All device_arrays of the program, for the executor's messages.
class guarded_arrays {
 public:
  static void add(const guarded_part* part) {
    const std::lock_guard<std::mutex> lock(turn());
    all().push_back(part);
  }
  static void remove(const guarded_part* part) {
    const std::lock_guard<std::mutex> lock(turn());
    std::vector<const guarded_part*>& parts = all();
    parts.erase(std::find(parts.begin(), parts.end(), part));
  }
  // Calls f(part) until it returns true.
  template <class F>
  static void visit(F&& f) {
    const std::lock_guard<std::mutex> lock(turn());
    for (const guarded_part* part : all()) {
      if (f(*part)) return;
    }
  }

 private:
  // Never destroyed: arrays of static duration may go after them.
  static std::mutex& turn() {
    static auto* one = new std::mutex;
    return *one;
  }
  static std::vector<const guarded_part*>& all() {
    static auto* parts = new std::vector<const guarded_part*>;
    return *parts;
  }
};

// A C-contiguous array on the device, every bit of it set at first.
template <class T>
class device_array {
 public:
  explicit device_array(std::vector<std::int64_t> shape, dtype type = detail::dtype_of<T>::kValue,
                        bool flush_high = true)
      : shape_(std::move(shape)), type_(type), size_(count(shape_)), memory_(size_ * sizeof(T)) {
    const std::size_t bytes = size_ * sizeof(T);
    unsigned char* data = flush_high ? memory_.end() - bytes : memory_.begin();
    data_ = reinterpret_cast<T*>(data);
    std::memset(static_cast<void*>(memory_.begin()), kPoison, memory_.size());
    part_ = {&memory_, data, bytes};
    guarded_arrays::add(&part_);
    strides_.resize(shape_.size());
    std::int64_t stride = 1;
    for (std::size_t axis = shape_.size(); axis-- > 0;) {
      strides_[axis] = stride;
      stride *= shape_[axis];
    }
  }
  ~device_array() { guarded_arrays::remove(&part_); }
  device_array(const device_array&) = delete;
  device_array& operator=(const device_array&) = delete;

  T* begin() const { return data_; }
  T* end() const { return data_ + size_; }
  std::size_t size() const { return size_; }
  T& operator[](std::int64_t i) const { return data_[i]; }
  array_view view() const {
    return {data_,
            shape_.data(),
            strides_.data(),
            static_cast<std::int32_t>(shape_.size()),
            type_,
            device_type::cuda,
            0};
  }

 private:
  static std::size_t count(const std::vector<std::int64_t>& shape) {
    std::size_t size = 1;
    for (const std::int64_t length : shape) size *= static_cast<std::size_t>(length);
    return size;
  }

  std::vector<std::int64_t> shape_;
  std::vector<std::int64_t> strides_;
  dtype type_;
  std::size_t size_;
  guarded_memory memory_;
  guarded_part part_;
  T* data_;
};

}  // namespace subquad::cuda::on_host

#endif  // SUBQUAD_CUDA_ON_HOST_GUARDED_HPP
