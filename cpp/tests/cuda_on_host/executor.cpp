#include "executor.hpp"

#include <dlfcn.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "guarded.hpp"

// Saves the calling fibre's registers on its stack and its stack pointer in *from, and goes on with
// the fibre whose stack pointer is `to`.
extern "C" void subquad_switch_fibre(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.pushsection .text
.globl subquad_switch_fibre
.hidden subquad_switch_fibre
.type subquad_switch_fibre, @function
subquad_switch_fibre:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size subquad_switch_fibre, .-subquad_switch_fibre
.popsection
)");
#elif defined(__aarch64__)
asm(R"(
.pushsection .text
.globl subquad_switch_fibre
.hidden subquad_switch_fibre
.type subquad_switch_fibre, %function
.balign 4
subquad_switch_fibre:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size subquad_switch_fibre, .-subquad_switch_fibre
.popsection
)");
#else
#error "the executor knows how to switch fibres on x86-64 and aarch64"
#endif

namespace subquad::cuda::on_host {

current_thread current;

namespace {

constexpr int kMostThreads = 1024;
constexpr int kWarpLanes = 32;
// What a block may have on every architecture the library is built for.
constexpr std::size_t kMostShared = 99 * 1024;

std::size_t round_up(std::size_t bytes, std::size_t to) { return (bytes + to - 1) / to * to; }

// The stacks of a block's threads: 64 KiB each, made when they are first used and used again by
// every block after. Below each lie 16 KiB that cannot be touched.
class stack_pool {
 public:
  static constexpr std::size_t kBytes = 64 * 1024;

  unsigned char* top(int thread) {
    if (base_ == nullptr) {
      void* base = mmap(nullptr, kSlot * kMostThreads, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (base == MAP_FAILED) throw std::bad_alloc();
      base_ = static_cast<unsigned char*>(base);
    }
    for (; usable_ <= thread; ++usable_) {
      if (mprotect(end(usable_) - kBytes, kBytes, PROT_READ | PROT_WRITE) != 0) {
        throw std::bad_alloc();
      }
    }
    return end(thread);
  }
  bool holds(const void* address) const {
    return base_ != nullptr && address >= base_ && address < base_ + kSlot * kMostThreads;
  }

 private:
  static constexpr std::size_t kGuard = 16 * 1024;
  static constexpr std::size_t kSlot = kBytes + kGuard;

  unsigned char* end(int thread) const {
    return base_ + kSlot * (static_cast<std::size_t>(thread) + 1);
  }

  unsigned char* base_ = nullptr;
  int usable_ = 0;
};

struct copy {
  void* to;
  const void* from;
  int bytes;
  int valid;
  unsigned group;
};

enum class waiting : unsigned char { for_nothing, for_block, for_warp, ended };

struct fibre {
  void* stack_pointer = nullptr;
  const char* what = nullptr;  // it waits in, or waited in last; null before its first wait
  place where{};
  std::vector<copy> copies;  // that are not done, oldest first
  unsigned open_group = 0;
};

// What the lanes of a warp wait in.
struct warp_state {
  struct call {
    std::uint32_t mask;
    combine_function combine;
  };
  std::uint32_t waits = 0;  // a bit for each lane
  call calls[kWarpLanes];
  const void* given[kWarpLanes];
  void* taken[kWarpLanes];
};

struct machine {
  std::mutex turn;
  order wanted = order::each_in_turn;
  bool order_is_known = false;
  unsigned launches = 0;

  stack_pool stacks;
  fibre fibres[kMostThreads];
  waiting states[kMostThreads];
  warp_state warps[kMostThreads / kWarpLanes];
  std::vector<int> order_of_threads;
  std::mt19937_64 random;

  // By number of pages.
  std::unique_ptr<guarded_memory> shared_memories[kMostShared / 4096 + 2];
  guarded_part shared;

  int threads = 0;
  int running = -1;  // the thread that has its turn; none in the scheduler
  void* scheduler = nullptr;
  std::string problem;
  void (*body)(const void*, void*) = nullptr;
  const void* kernel = nullptr;

  int ended = 0;
  int at_barrier = 0;
  int votes = 0;          // of those at the barrier
  int votes_of_last = 0;  // of the barrier passed last
  place barrier{};        // where the first thread came to it
  bool barriers_differ = false;

  std::atomic<pthread_t> owner{};
  sigjmp_buf fault;
  int fault_signal = 0;
  unsigned char* fault_address = nullptr;
  void* fault_instruction = nullptr;
};

machine only_machine;
machine& the_machine() { return only_machine; }

std::string thread_text(int thread) {
  return "thread " + std::to_string(thread) + " of block " + std::to_string(current.block.x);
}

std::string place_text(const place& where) {
  const char* name = where.file;
  for (const char* at = where.file; *at; ++at) {
    if (*at == '/') name = at + 1;
  }
  return std::string(name) + ":" + std::to_string(where.line);
}

bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
bool same_place(const place& a, const place& b) {
  return a.line == b.line && same_text(a.file, b.file);
}

void switch_to_scheduler() {
  machine& m = the_machine();
  subquad_switch_fibre(&m.fibres[m.running].stack_pointer, m.scheduler);
}

// Ends the grid: the fibres are left where they are.
[[noreturn]] void fail(std::string problem) {
  machine& m = the_machine();
  if (m.running < 0) throw executor_error(problem);
  m.problem = std::move(problem);
  for (;;) switch_to_scheduler();
}

fibre& self() {
  machine& m = the_machine();
  if (m.running < 0) throw executor_error("expected a call from within a kernel");
  return m.fibres[m.running];
}

// After what it was that a thread did something.
std::string after_text(const fibre& thread) {
  return thread.what ? std::string(", after ") + thread.what + " at " + place_text(thread.where)
                     : ", before its first wait";
}

void wait_in(waiting state, const char* what, place where) {
  fibre& own = self();
  own.what = what;
  own.where = where;
  the_machine().states[the_machine().running] = state;
  switch_to_scheduler();
}

void perform(const copy& each) {
  if (each.valid > 0) std::memcpy(each.to, each.from, static_cast<std::size_t>(each.valid));
  std::memset(static_cast<unsigned char*>(each.to) + each.valid, 0,
              static_cast<std::size_t>(each.bytes - each.valid));
}

[[noreturn]] void enter() {
  machine& m = the_machine();
  try {
    m.body(m.kernel, m.shared.data);
  } catch (const std::exception& e) {
    m.problem = thread_text(m.running) + " threw: " + e.what();
  } catch (...) {
    m.problem = thread_text(m.running) + " threw something";
  }
  const fibre& own = self();
  if (m.problem.empty() && !own.copies.empty()) {
    m.problem = thread_text(m.running) + " ended with " + std::to_string(own.copies.size()) +
                " copies that it did not wait for" + after_text(own);
  }
  m.states[m.running] = waiting::ended;
  ++m.ended;
  for (;;) switch_to_scheduler();
}

void begin_fibre(int thread) {
  machine& m = the_machine();
  // Stacks that began at equal offsets in their pages would share few sets of the caches.
  unsigned char* end = m.stacks.top(thread) - 64 - thread % 32 * 128;
  // As subquad_switch_fibre leaves a stack: saved registers below the address it returns to. At a
  // function's first instruction a stack is 8 bytes off a multiple of 16 on x86-64.
  auto* top = reinterpret_cast<std::uintptr_t*>(end);
#if defined(__x86_64__)
  *--top = 0;
  *--top = reinterpret_cast<std::uintptr_t>(&enter);
  for (int i = 0; i < 6; ++i) *--top = 0;
#else
  top -= 20;
  std::fill_n(top, 20, std::uintptr_t{0});
  top[11] = reinterpret_cast<std::uintptr_t>(&enter);
#endif
  fibre& each = m.fibres[thread];
  each.stack_pointer = top;
  each.what = nullptr;
  each.copies.clear();
  each.open_group = 0;
  m.states[thread] = waiting::for_nothing;
}

void turn(int thread) {
  machine& m = the_machine();
  m.running = thread;
  current.thread.x = static_cast<unsigned>(thread);
  subquad_switch_fibre(&m.scheduler, m.fibres[thread].stack_pointer);
  m.running = -1;
}

std::string hex_text(std::uint32_t bits) {
  char text[16];
  std::snprintf(text, sizeof(text), "%#010x", bits);
  return text;
}

// Who waits where.
std::string waiting_text() {
  machine& m = the_machine();
  struct group {
    int first;
    int count;
  };
  std::vector<group> groups;
  const auto mask_of = [&](int t) { return m.warps[t / kWarpLanes].calls[t % kWarpLanes].mask; };
  const auto same = [&](int a, int b) {
    if (m.states[a] != m.states[b]) return false;
    if (m.states[a] == waiting::ended) return true;
    if (!same_place(m.fibres[a].where, m.fibres[b].where)) return false;
    return m.states[a] == waiting::for_block ||
           (mask_of(a) == mask_of(b) && same_text(m.fibres[a].what, m.fibres[b].what));
  };
  for (int t = 0; t < m.threads; ++t) {
    const auto found = std::find_if(groups.begin(), groups.end(),
                                    [&](const group& g) { return same(g.first, t); });
    if (found == groups.end()) {
      groups.push_back({t, 1});
    } else {
      ++found->count;
    }
  }
  std::string text;
  for (const group& g : groups) {
    if (&g - groups.data() == 6) return text + "; and others";
    text += "; thread " + std::to_string(g.first);
    if (g.count > 1) text += " and " + std::to_string(g.count - 1) + " more";
    if (m.states[g.first] == waiting::ended) {
      text += " ended";
      continue;
    }
    text += std::string(" in ") + m.fibres[g.first].what;
    if (m.states[g.first] == waiting::for_warp) text += " of lanes " + hex_text(mask_of(g.first));
    text += " at " + place_text(m.fibres[g.first].where);
  }
  return text;
}

void release_block() {
  machine& m = the_machine();
  m.votes_of_last = m.votes;
  m.votes = 0;
  m.at_barrier = 0;
  std::fill_n(m.states, m.threads, waiting::for_nothing);
}

void run_block() {
  machine& m = the_machine();
  std::memset(m.shared.data, kPoison, m.shared.bytes);
  m.ended = 0;
  m.at_barrier = 0;
  m.votes = 0;
  m.barriers_differ = false;
  for (int t = 0; t < m.threads; ++t) begin_fibre(t);
  for (int w = 0; w < m.threads / kWarpLanes; ++w) m.warps[w].waits = 0;
  while (m.ended < m.threads) {
    bool progress = false;
    for (const int t : m.order_of_threads) {
      if (m.states[t] != waiting::for_nothing) continue;
      turn(t);
      if (!m.problem.empty()) return;
      progress = true;
    }
    if (m.at_barrier == m.threads) {
      if (m.barriers_differ) {
        m.problem = "the threads of block " + std::to_string(current.block.x) +
                    " wait at different barriers" + waiting_text();
        return;
      }
      release_block();
    } else if (!progress) {
      m.problem = "threads of block " + std::to_string(current.block.x) +
                  " wait for threads that do not come" + waiting_text();
      return;
    }
  }
}

extern "C" void subquad_on_fault(int signal, siginfo_t* info, void* context);

// Turns faults of kernels into problems while it lives.
class fault_handler {
 public:
  fault_handler() {
    stack_t own{};
    own.ss_sp = signal_stack().begin();
    own.ss_size = signal_stack().size();
    if (sigaltstack(&own, &stack_before_) != 0) {
      throw executor_error("the executor cannot run on the stack of a signal handler");
    }
    struct sigaction action{};
    action.sa_sigaction = subquad_on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    for (int i = 0; i < kSignals; ++i) sigaction(kSignal[i], &action, &before(i));
  }
  ~fault_handler() {
    for (int i = 0; i < kSignals; ++i) sigaction(kSignal[i], &before(i), nullptr);
    // An alternate stack that is disabled need not have a valid size.
    if (stack_before_.ss_flags & SS_DISABLE) stack_before_.ss_size = MINSIGSTKSZ;
    sigaltstack(&stack_before_, nullptr);
  }
  fault_handler(const fault_handler&) = delete;
  fault_handler& operator=(const fault_handler&) = delete;

  // A fault that is no kernel's.
  static void pass_on(int signal, siginfo_t* info, void* context) {
    int i = 0;
    while (kSignal[i] != signal) ++i;
    const struct sigaction& handler = before(i);
    if (handler.sa_flags & SA_SIGINFO) {
      handler.sa_sigaction(signal, info, context);
    } else if (handler.sa_handler != SIG_DFL && handler.sa_handler != SIG_IGN) {
      handler.sa_handler(signal);
    } else {
      // The instruction that faulted runs again, without a handler; what was sent is sent again.
      sigaction(signal, &handler, nullptr);
      if (info->si_code <= 0) raise(signal);
    }
  }

 private:
  static constexpr int kSignals = 3;
  static constexpr int kSignal[kSignals] = {SIGSEGV, SIGBUS, SIGFPE};

  static struct sigaction& before(int i) {
    static struct sigaction actions[kSignals];
    return actions[i];
  }
  static guarded_memory& signal_stack() {
    static guarded_memory stack(64 * 1024);
    return stack;
  }

  stack_t stack_before_{};
};

extern "C" void subquad_on_fault(int signal, siginfo_t* info, void* context) {
  machine& m = the_machine();
  // Sent by somebody (si_code <= 0), or a fault of another thread or of the executor itself.
  if (info->si_code <= 0 || !pthread_equal(m.owner.load(), pthread_self()) || m.running < 0) {
    fault_handler::pass_on(signal, info, context);
    return;
  }
  m.fault_signal = signal;
  m.fault_address = static_cast<unsigned char*>(info->si_addr);
  const auto& registers = static_cast<const ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  const auto instruction = static_cast<std::uintptr_t>(registers.gregs[REG_RIP]);
#else
  const auto instruction = static_cast<std::uintptr_t>(registers.pc);
#endif
  m.fault_instruction = reinterpret_cast<void*>(instruction);
  siglongjmp(m.fault, 1);
}

// For addr2line.
std::string instruction_text(const void* instruction) {
  Dl_info object{};
  if (dladdr(instruction, &object) == 0 || object.dli_fname == nullptr) return "";
  char offset[32];
  std::snprintf(offset, sizeof(offset), "%#tx",
                static_cast<const char*>(instruction) - static_cast<const char*>(object.dli_fbase));
  const std::string name(object.dli_fname);
  return " (instruction " + std::string(offset) + " of " + name.substr(name.rfind('/') + 1) + ")";
}

[[gnu::noinline]] std::string fault_text() {
  machine& m = the_machine();
  const fibre& thread = m.fibres[m.running];
  const auto bytes = [](std::ptrdiff_t offset, std::size_t size) {
    return "byte " + std::to_string(offset) + " of " + std::to_string(size);
  };
  std::string what;
  if (m.fault_signal == SIGFPE) {
    what = " divides an integer by zero";
  } else if (m.shared.memory->holds(m.fault_address)) {
    what = " touches shared memory at " + bytes(m.fault_address - m.shared.data, m.shared.bytes);
  } else if (m.stacks.holds(m.fault_address)) {
    what = " overflows its stack of " + std::to_string(stack_pool::kBytes) + " bytes";
  } else {
    what = " touches memory that is not there";
    guarded_arrays::visit([&](const guarded_part& part) {
      if (!part.memory->holds(m.fault_address)) return false;
      what = " touches an array at " + bytes(m.fault_address - part.data, part.bytes);
      return true;
    });
  }
  return thread_text(m.running) + what + after_text(thread) + instruction_text(m.fault_instruction);
}

order order_of_environment() {
  const char* name = std::getenv("SUBQUAD_CUDA_ON_HOST_ORDER");
  if (name == nullptr || *name == 0) return order::each_in_turn;
  const std::string text(name);
  if (text == "ascending") return order::ascending;
  if (text == "descending") return order::descending;
  if (text == "shuffled") return order::shuffled;
  throw executor_error(
      "SUBQUAD_CUDA_ON_HOST_ORDER: expected ascending, descending or shuffled, got " + text);
}

std::vector<int> turns(int count, order how) {
  std::vector<int> list(static_cast<std::size_t>(count));
  std::iota(list.begin(), list.end(), 0);
  if (how == order::descending) std::reverse(list.begin(), list.end());
  if (how == order::shuffled) std::shuffle(list.begin(), list.end(), the_machine().random);
  return list;
}

// Writes that missed what they were for, and hit no page that would have told.
void check_surroundings() {
  machine& m = the_machine();
  guarded_arrays::visit([&](const guarded_part& part) {
    const std::ptrdiff_t offset = part.written_outside();
    if (offset == guarded_part::kNothing) return false;
    part.poison_surroundings();
    m.problem = "the grid, or the host before it, wrote to byte " + std::to_string(offset) +
                " of an array of " + std::to_string(part.bytes);
    return true;
  });
}

// `listed`: the blocks in their order, where it is no simple one.
[[gnu::noinline]] void run_blocks(std::int64_t blocks, order how, const std::vector<int>& listed) {
  machine& m = the_machine();
  for (std::int64_t index = 0; index < blocks; ++index) {
    std::int64_t block = how == order::descending ? blocks - 1 - index : index;
    if (!listed.empty()) block = listed[static_cast<std::size_t>(index)];
    current.block.x = static_cast<unsigned>(block);
    if (index == 0 || how == order::shuffled) m.order_of_threads = turns(m.threads, how);
    // Above the guarded page below it, or below the one above it.
    const guarded_memory& memory = *m.shared.memory;
    m.shared.data = (m.launches + static_cast<unsigned>(index)) % 2
                        ? memory.begin()
                        : memory.end() - round_up(m.shared.bytes, 16);
    m.shared.poison_surroundings();
    run_block();
    if (!m.problem.empty()) return;
    const std::ptrdiff_t offset = m.shared.written_outside();
    if (offset != guarded_part::kNothing) {
      m.problem = "block " + std::to_string(block) + " wrote to byte " + std::to_string(offset) +
                  " of shared memory, which has " + std::to_string(m.shared.bytes);
      return;
    }
  }
}

void run_blocks_until_fault(std::int64_t blocks, order how, const std::vector<int>& listed) {
  if (sigsetjmp(the_machine().fault, 1) == 0) {
    run_blocks(blocks, how, listed);
  } else {
    the_machine().problem = fault_text();
  }
}

// The machine at rest again, however a grid ends.
struct grid_end {
  ~grid_end() {
    the_machine().running = -1;
    the_machine().problem.clear();
    the_machine().owner = pthread_t{};
  }
};

}  // namespace

void set_order(order wanted) {
  machine& m = the_machine();
  const std::lock_guard<std::mutex> lock(m.turn);
  m.wanted = wanted;
  m.order_is_known = true;
}

void run_grid(std::int64_t blocks, int threads, std::size_t shared_bytes,
              void (*body)(const void* kernel, void* shared), const void* kernel) {
  if (threads < 1 || threads > kMostThreads || threads % kWarpLanes != 0) {
    throw executor_error("expected blocks of whole warps, at most 1024 threads, got " +
                         std::to_string(threads));
  }
  if (shared_bytes > kMostShared) {
    throw executor_error("expected at most " + std::to_string(kMostShared) +
                         " bytes of shared memory, got " + std::to_string(shared_bytes));
  }
  if (blocks < 0 || blocks > std::numeric_limits<std::int32_t>::max()) {
    throw executor_error("expected at most 2^31 - 1 blocks, got " + std::to_string(blocks));
  }
  machine& m = the_machine();
  const std::lock_guard<std::mutex> lock(m.turn);
  if (!m.order_is_known) {
    m.wanted = order_of_environment();
    m.order_is_known = true;
  }
  order how = m.wanted;
  if (how == order::each_in_turn) {
    constexpr order kEach[] = {order::ascending, order::descending, order::shuffled};
    how = kEach[m.launches % 3];
  }
  ++m.launches;
  m.random.seed(m.launches);
  std::unique_ptr<guarded_memory>& memory =
      m.shared_memories[(shared_bytes + guarded_memory::page_size() - 1) /
                        guarded_memory::page_size()];
  if (!memory) memory = std::make_unique<guarded_memory>(shared_bytes);
  m.shared = {memory.get(), memory->begin(), shared_bytes};
  m.threads = threads;
  m.body = body;
  m.kernel = kernel;
  current.thread = {};
  current.block = {};
  current.block_size = {static_cast<unsigned>(threads), 1, 1};
  current.grid_size = {static_cast<unsigned>(blocks), 1, 1};
  const grid_end end;
  m.owner = pthread_self();
  {
    // More are not shuffled: the list would take too much memory.
    constexpr std::int64_t kMostListed = 1 << 20;
    const bool is_listed = how == order::shuffled && blocks <= kMostListed;
    const std::vector<int> listed = turns(is_listed ? static_cast<int>(blocks) : 0, how);
    const fault_handler handler;
    run_blocks_until_fault(blocks, how, listed);
  }
  if (m.problem.empty()) check_surroundings();
  if (!m.problem.empty()) throw executor_error(std::exchange(m.problem, {}));
}

void clear(void* data, std::size_t bytes) {
  if (bytes > 0) std::memset(data, 0, bytes);
}

int block_barrier(bool predicate, place where) {
  machine& m = the_machine();
  if (m.at_barrier == 0) {
    m.barrier = where;
  } else if (!same_place(m.barrier, where)) {
    m.barriers_differ = true;
  }
  ++m.at_barrier;
  m.votes += predicate;
  wait_in(waiting::for_block, "__syncthreads", where);
  return m.votes_of_last;
}

void warp_exchange(std::uint32_t mask, const void* given, void* taken, combine_function combine,
                   const char* what, place where) {
  machine& m = the_machine();
  fibre& own = self();
  const int lane = m.running % kWarpLanes;
  const int first = m.running - lane;
  warp_state& warp = m.warps[first / kWarpLanes];
  if (!(mask >> lane & 1)) {
    fail(thread_text(m.running) + " is not in the mask " + hex_text(mask) + " of its " + what +
         " at " + place_text(where));
  }
  warp.calls[lane] = {mask, combine};
  warp.given[lane] = given;
  warp.taken[lane] = taken;
  const std::uint32_t others = mask & ~(1u << lane);
  bool is_last = (warp.waits & others) == others;
  for (int other = 0; is_last && other < kWarpLanes; ++other) {
    if (!(others >> other & 1)) continue;
    // One that waits for other lanes may come here yet.
    is_last = warp.calls[other].mask == mask;
    const fibre& each = m.fibres[first + other];
    if (is_last && (warp.calls[other].combine != combine || !same_place(each.where, where) ||
                    !same_text(each.what, what))) {
      fail(thread_text(m.running) + " is in " + what + " at " + place_text(where) + ", thread " +
           std::to_string(first + other) + " of its warp in " + each.what + " at " +
           place_text(each.where));
    }
  }
  if (!is_last) {
    warp.waits |= 1u << lane;
    wait_in(waiting::for_warp, what, where);
    return;
  }
  const void* all_given[kWarpLanes];
  void* all_taken[kWarpLanes];
  for (int other = 0; other < kWarpLanes; ++other) {
    const bool takes_part = mask >> other & 1;
    all_given[other] = takes_part ? warp.given[other] : nullptr;
    all_taken[other] = takes_part ? warp.taken[other] : nullptr;
  }
  combine(mask, all_given, all_taken);
  own.what = what;
  own.where = where;
  warp.waits &= ~mask;
  for (int other = 0; other < kWarpLanes; ++other) {
    if (others >> other & 1) m.states[first + other] = waiting::for_nothing;
  }
}

std::uint32_t ballot(std::uint32_t mask, bool vote, const char* what, place where) {
  std::uint32_t votes = 0;
  warp_exchange(
      mask, &vote, &votes,
      [](std::uint32_t of, const void* const* given, void* const* taken) {
        std::uint32_t all = 0;
        for (int lane = 0; lane < kWarpLanes; ++lane) {
          if ((of >> lane & 1) && *static_cast<const bool*>(given[lane])) all |= 1u << lane;
        }
        for (int lane = 0; lane < kWarpLanes; ++lane) {
          if (of >> lane & 1) *static_cast<std::uint32_t*>(taken[lane]) = all;
        }
      },
      what, where);
  return votes;
}

shuffle_segment segment_of(int width, int by, const char* what, place where) {
  if (width < 1 || width > kWarpLanes || (width & (width - 1)) != 0) {
    fail(thread_text(the_machine().running) + " is in " + what + " at " + place_text(where) +
         " with a width of " + std::to_string(width) + ", expected a power of 2 up to 32");
  }
  if (by < 0 || by >= kWarpLanes) {
    fail(thread_text(the_machine().running) + " is in " + what + " at " + place_text(where) +
         " over a distance of " + std::to_string(by) + ", expected one in [0, 32)");
  }
  const int lane = static_cast<int>(current.thread.x) % kWarpLanes;
  const int first = lane & ~(width - 1);
  return {lane, first, first + width};
}

void copy_async(void* shared, const void* global, int bytes, int valid) {
  machine& m = the_machine();
  fibre& own = self();
  const auto problem = [&](const std::string& what) {
    fail(thread_text(m.running) + " copies " + what + after_text(own));
  };
  const auto is_aligned = [&](const void* address) {
    return reinterpret_cast<std::uintptr_t>(address) % static_cast<std::uintptr_t>(bytes) == 0;
  };
  if (!is_aligned(shared) || !is_aligned(global)) {
    problem(std::to_string(bytes) + " bytes between addresses that are not aligned to them");
  }
  if (valid < 0 || valid > bytes) {
    problem(std::to_string(valid) + " valid bytes of " + std::to_string(bytes));
  }
  const auto to = reinterpret_cast<std::uintptr_t>(shared);
  const auto begin = reinterpret_cast<std::uintptr_t>(m.shared.data);
  if (to < begin || to + static_cast<std::uintptr_t>(bytes) > begin + m.shared.bytes) {
    problem("to byte " + std::to_string(static_cast<std::ptrdiff_t>(to - begin)) +
            " of shared memory, which has " + std::to_string(m.shared.bytes));
  }
  if (valid > 0) {
    // A source that is not there faults here, where the copy begins.
    static_cast<void>(static_cast<const volatile unsigned char*>(global)[0]);
    static_cast<void>(static_cast<const volatile unsigned char*>(global)[valid - 1]);
  }
  std::memset(shared, kPoison, static_cast<std::size_t>(bytes));
  own.copies.push_back({shared, global, bytes, valid, own.open_group});
}

void commit_copies() { ++self().open_group; }

void wait_copies(int pending) {
  fibre& own = self();
  const auto still_pending =
      std::find_if(own.copies.begin(), own.copies.end(), [&](const copy& each) {
        return each.group + static_cast<unsigned>(pending) >= own.open_group;
      });
  std::for_each(own.copies.begin(), still_pending, perform);
  own.copies.erase(own.copies.begin(), still_pending);
}

float from_float16(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude =
        mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  }
  return bits >> 15 ? -magnitude : magnitude;
}

std::uint32_t round_to_tf32(float x) {
  if (x != x) return 0x7fffffffu;
  auto bits = bits_as<std::uint32_t>(x);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits += 0x1000u;
  return bits & ~std::uint32_t{0x1fff};
}

float power_of_2(float x) {
  const float power = std::exp2(x);
  return power < std::numeric_limits<float>::min() ? 0.0f : power;
}

namespace {

constexpr int kColumns = 8;  // of every product

// Adds a_k b_k to sums of float, for eight columns, as tensor cores of compute capability 8.0 have
// been seen to: kTerms products and the sum before, each cut to 25 bits of the largest among them,
// are added and cut to float. Later devices take more terms at once and keep more bits.
template <int kTerms>
void add_products(float (&sums)[kColumns], const float* a, const float (*b)[kColumns]) {
  constexpr std::int32_t kMagnitude = 0x7fffffff;
  constexpr std::int32_t kExponent = 0x7f800000;
  constexpr std::int32_t kOne = 1 << 23;  // step of the exponent
  // Where scales may leave the range of float, plain sums do.
  constexpr std::int32_t kLow = (127 - 60) * kOne;
  constexpr std::int32_t kHigh = (127 + 120) * kOne;
  float products[kTerms][kColumns];
  std::int32_t largest[kColumns];
  std::int32_t exponents[kColumns];
  for (int c = 0; c < kColumns; ++c) largest[c] = bits_as<std::int32_t>(sums[c]) & kMagnitude;
  for (int k = 0; k < kTerms; ++k) {
    for (int c = 0; c < kColumns; ++c) {
      products[k][c] = a[k] * b[k][c];
      // Magnitudes are ordered as their bits are.
      largest[c] = std::max(largest[c], bits_as<std::int32_t>(products[k][c]) & kMagnitude);
    }
  }
  std::int32_t is_extreme = 0;
  for (int c = 0; c < kColumns; ++c) {
    exponents[c] = largest[c] & kExponent;
    is_extreme |= (exponents[c] > kHigh) | ((largest[c] != 0) & (exponents[c] < kLow));
    exponents[c] = std::max(exponents[c], kLow);
  }
  if (is_extreme) {
    for (int c = 0; c < kColumns; ++c) {
      for (int k = 0; k < kTerms; ++k) sums[c] += products[k][c];
    }
    return;
  }
  float scales[kColumns];
  std::int32_t totals[kColumns];
  for (int c = 0; c < kColumns; ++c) {
    scales[c] = bits_as<float>((2u * 127 + 24) * std::uint32_t{kOne} -
                               static_cast<std::uint32_t>(exponents[c]));
    totals[c] = static_cast<std::int32_t>(sums[c] * scales[c]);
  }
  for (int k = 0; k < kTerms; ++k) {
    for (int c = 0; c < kColumns; ++c) {
      totals[c] += static_cast<std::int32_t>(products[k][c] * scales[c]);
    }
  }
  for (int c = 0; c < kColumns; ++c) {
    const auto nearest = static_cast<float>(totals[c]);
    const auto back = static_cast<std::int32_t>(nearest);
    const std::int32_t is_beyond = std::abs(back) > std::abs(totals[c]);
    const auto cut = bits_as<float>(bits_as<std::int32_t>(nearest) - is_beyond);
    sums[c] = cut * bits_as<float>(exponents[c] - 24 * kOne);
  }
}

template <class T>
struct fragments {
  T* d;
  const void* a;
  const void* b;
};

// kPerRegister: 2 for operands of 16 bits.
template <float (*widened)(std::uint32_t register_bits, int half), int kPerRegister>
void combine_mma(std::uint32_t, const void* const* given, void* const*) {
  constexpr int kDepth = 8 * kPerRegister;
  constexpr int kTerms = 4 * kPerRegister;
  float a[16][kDepth];
  float b[kDepth][kColumns];
  float d[16][kColumns];
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    const int g = lane / 4;
    const int t = lane % 4;
    const auto* own = static_cast<const fragments<float>*>(given[lane]);
    const auto* of_a = static_cast<const std::uint32_t*>(own->a);
    const auto* of_b = static_cast<const std::uint32_t*>(own->b);
    for (int half = 0; half < kPerRegister; ++half) {
      const int k = kPerRegister * t + half;
      const int far = 4 * kPerRegister;
      a[g][k] = widened(of_a[0], half);
      a[g + 8][k] = widened(of_a[1], half);
      a[g][k + far] = widened(of_a[2], half);
      a[g + 8][k + far] = widened(of_a[3], half);
      b[k][g] = widened(of_b[0], half);
      b[k + far][g] = widened(of_b[1], half);
    }
    for (int v = 0; v < 4; ++v) d[g + v / 2 * 8][2 * t + v % 2] = own->d[v];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; k += kTerms) add_products<kTerms>(d[row], a[row] + k, b + k);
  }
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    const auto* own = static_cast<const fragments<float>*>(given[lane]);
    for (int v = 0; v < 4; ++v) own->d[v] = d[lane / 4 + v / 2 * 8][2 * (lane % 4) + v % 2];
  }
}

// Tensor cores do not look at the low 13 bits of a tf32 operand.
float from_tf32(std::uint32_t bits, int) { return bits_as<float>(bits & ~std::uint32_t{0x1fff}); }
float from_half(std::uint32_t bits, int half) {
  return from_float16(static_cast<std::uint16_t>(bits >> 16 * half));
}
float from_bfloat(std::uint32_t bits, int half) { return bits_as<float>(bits >> 16 * half << 16); }

template <class T>
void exchange_mma(combine_function combine, T* d, const void* a, const void* b, place where) {
  const fragments<T> own{d, a, b};
  warp_exchange(0xffffffffu, &own, nullptr, combine, "mma", where);
}

}  // namespace

void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
              const char* file, int line) {
  exchange_mma<float>(combine_mma<from_tf32, 1>, d, a, b, {file, line});
}
void mma_float16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                 const char* file, int line) {
  exchange_mma<float>(combine_mma<from_half, 2>, d, a, b, {file, line});
}
void mma_bfloat16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                  const char* file, int line) {
  exchange_mma<float>(combine_mma<from_bfloat, 2>, d, a, b, {file, line});
}
void mma_float64(double (&d)[2], double a, double b, const char* file, int line) {
  exchange_mma<double>(
      [](std::uint32_t, const void* const* given, void* const*) {
        double left[8][4];
        double right[4][8];
        for (int lane = 0; lane < 32; ++lane) {
          const auto* own = static_cast<const fragments<double>*>(given[lane]);
          left[lane / 4][lane % 4] = *static_cast<const double*>(own->a);
          right[lane % 4][lane / 4] = *static_cast<const double*>(own->b);
        }
        for (int lane = 0; lane < 32; ++lane) {
          const auto* own = static_cast<const fragments<double>*>(given[lane]);
          for (int value = 0; value < 2; ++value) {
            for (int k = 0; k < 4; ++k) {
              own->d[value] += left[lane / 4][k] * right[k][2 * (lane % 4) + value];
            }
          }
        }
      },
      d, &a, &b, {file, line});
}

}  // namespace subquad::cuda::on_host
