// The third implementation of group.h, for the host: every lane is a thread, barriers are real, and
// several blocks run side by side. Under the thread sanitizer it shows what a barrier is missing
// for, in kernels as they are: tests/cpp/CMakeLists.txt, scripts/cuda_barriers.py.
//
// A warp may have fewer lanes than 32 and a block fewer warps than its threads say: those there are
// take the items of the others in turn, with the same results.
//
//   KINML_LANES, KINML_WARPS, KINML_BLOCKS  how many at one time (4, 2, 2)
//   KINML_WITHOUT_BARRIER=FILE:LINE         the step that is called there ends without a barrier
//   KINML_BARRIERS=FILE                     where the steps are that were called is written there
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace kinml::cuda {
namespace threads {

inline constexpr int kMostLanes = 32;

inline int setting(const char* name, int usual) {
  const char* const text = std::getenv(name);
  return text == nullptr ? usual : std::atoi(text);
}

// Where a step is called.
struct Site {
  const char* file;
  int line;

  std::string text() const {
    const char* const slash = std::strrchr(file, '/');
    return std::string(slash == nullptr ? file : slash + 1) + ":" + std::to_string(line);
  }
};

// Of which steps the barriers are left out.
class Sites {
 public:
  static Sites& all() {
    static Sites sites;
    return sites;
  }
  bool has_barrier(const Site& site) {
    if (!list_.empty()) {
      const std::lock_guard<std::mutex> lock(mutex_);
      called_.insert(site.text());
    }
    return site.line != line_ || site.text() != without_;
  }

 private:
  Sites() {
    if (const char* const text = std::getenv("KINML_WITHOUT_BARRIER")) {
      without_ = text;
      line_ = std::atoi(without_.substr(without_.find(':') + 1).c_str());
    }
    if (const char* const text = std::getenv("KINML_BARRIERS")) list_ = text;
  }
  ~Sites() {
    if (list_.empty()) return;
    std::ofstream file(list_);
    for (const std::string& site : called_) file << site << "\n";
  }

  std::string without_, list_;
  int line_ = -1;
  std::mutex mutex_;
  std::set<std::string> called_;
};

// Holds n threads until all have come. What one writes before is seen by the others after it, if it
// `orders`; nothing else is: a thread that leaves late must not see what others write until the
// next barrier, as with those of the system it may (then races stay hidden), and so it waits for a
// number that only the last one to come writes.
class Barrier {
 public:
  void wait(int n, bool orders = true) {
    const std::uint32_t phase = phase_.load(std::memory_order_relaxed);
    const auto both = orders ? std::memory_order_acq_rel : std::memory_order_relaxed;
    if (arrived_.fetch_add(1, both) + 1 == n) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, orders ? std::memory_order_release : std::memory_order_relaxed);
      syscall(SYS_futex, &phase_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
      return;
    }
    const auto seen = orders ? std::memory_order_acquire : std::memory_order_relaxed;
    while (phase_.load(seen) == phase)
      syscall(SYS_futex, &phase_, FUTEX_WAIT_PRIVATE, phase, nullptr, nullptr, 0);
  }

 private:
  std::atomic<int> arrived_{0};
  std::atomic<std::uint32_t> phase_{0};
};

struct Lanes {  // of a warp
  Barrier barrier, ballot;
  std::atomic<int> bits[2][kMostLanes];
};
struct Team {  // of a block
  int warps, lanes;
  std::unique_ptr<Lanes[]> of_warp;
  Barrier barrier;
  char* memory = nullptr;

  int threads() const { return warps * lanes; }
};
struct Lane {
  Team* team;
  int warp, lane;
  unsigned ballots = 0;

  int number() const { return warp * team->lanes + lane; }
  Lanes& others() const { return team->of_warp[warp]; }
};

}  // namespace threads

#define KINML_SITE \
  threads::Site {  \
    file, line     \
  }

class Warp {
 public:
  explicit Warp(threads::Lane& lane) : lane_(lane) {}

  template <class F>
  void each(int n, const F& f, const char* file = __builtin_FILE(),
            int line = __builtin_LINE()) const {
    for (int i = lane_.lane; i < n; i += lanes()) f(i);
    end_step(KINML_SITE);
  }
  template <class Chosen, class Put>
  int select(int n, const Chosen& chosen, const Put& put, const char* file = __builtin_FILE(),
             int line = __builtin_LINE()) const {
    int found = 0;
    for (int base = 0; base < n; base += lanes()) {
      const int i = base + lane_.lane;
      const bool mine = i < n && chosen(i);
      // A ballot orders nothing in memory.
      std::atomic<int>* const bits = lane_.others().bits[lane_.ballots++ % 2];
      bits[lane_.lane].store(mine, std::memory_order_relaxed);
      lane_.others().ballot.wait(lanes(), false);
      int before = 0, all = 0;
      for (int l = 0; l < lanes(); ++l) {
        const int bit = bits[l].load(std::memory_order_relaxed);
        before += l < lane_.lane ? bit : 0;
        all += bit;
      }
      if (mine) put(i, found + before);
      found += all;
    }
    end_step(KINML_SITE);
    return found;
  }

 private:
  int lanes() const { return lane_.team->lanes; }
  void end_step(const threads::Site& site) const {
    if (threads::Sites::all().has_barrier(site)) lane_.others().barrier.wait(lanes());
  }

  threads::Lane& lane_;
};

class Block {
 public:
  Block(int index, int threads, threads::Lane& lane)
      : index_(index), threads_(threads), lane_(lane) {}

  int index() const { return index_; }
  int threads() const { return threads_; }
  int warps() const { return threads_ / 32; }
  char* memory() const { return lane_.team->memory; }

  template <class F>
  void each(int n, const F& f, const char* file = __builtin_FILE(),
            int line = __builtin_LINE()) const {
    for (int i = lane_.number(); i < n; i += lane_.team->threads()) f(i);
    end_step(KINML_SITE);
  }
  template <class F>
  void each_warp(const F& f, const char* file = __builtin_FILE(),
                 int line = __builtin_LINE()) const {
    for (int w = lane_.warp; w < warps(); w += lane_.team->warps) f(Warp(lane_), w);
    end_step(KINML_SITE);
  }
  void enter(int* lock) const {
    if (lane_.number() == 0)
      for (int free = 0;
           !std::atomic_ref<int>(*lock).compare_exchange_weak(free, 1, std::memory_order_acquire);
           free = 0)
        std::this_thread::yield();
    lane_.team->barrier.wait(lane_.team->threads());
  }
  void leave(int* lock) const {
    lane_.team->barrier.wait(lane_.team->threads());
    if (lane_.number() == 0) std::atomic_ref<int>(*lock).store(0, std::memory_order_release);
  }

 private:
  void end_step(const threads::Site& site) const {
    if (threads::Sites::all().has_barrier(site)) lane_.team->barrier.wait(lane_.team->threads());
  }

  int index_, threads_;
  threads::Lane& lane_;
};

#undef KINML_SITE

namespace threads {

// The threads, which stay from launch to launch.
class Pool {
 public:
  using Job = std::function<void(Lane&, int block)>;

  static Pool& all() {
    static Pool pool;
    return pool;
  }
  // job(lane, block) by the lanes of every block, whose memory begins as NaN.
  void run(int blocks, std::int64_t bytes, const Job& job) {
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = &job;
    blocks_ = blocks;
    bytes_ = bytes;
    left_ = static_cast<int>(threads_.size());
    ++launch_;
    begin_.notify_all();
    end_.wait(lock, [&] { return left_ == 0; });
  }

 private:
  Pool() : teams_(static_cast<std::size_t>(setting("KINML_BLOCKS", 2))) {
    for (std::size_t t = 0; t < teams_.size(); ++t) {
      Team& team = teams_[t];
      team.warps = setting("KINML_WARPS", 2);
      team.lanes = setting("KINML_LANES", 4);
      team.of_warp = std::make_unique<Lanes[]>(static_cast<std::size_t>(team.warps));
      for (int w = 0; w < team.warps; ++w)
        for (int l = 0; l < team.lanes; ++l)
          threads_.emplace_back([this, t, w, l] { work(static_cast<int>(t), {&teams_[t], w, l}); });
    }
  }
  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      over_ = true;
      begin_.notify_all();
    }
    for (std::thread& thread : threads_) thread.join();
  }
  void work(int t, Lane lane) {
    Team& team = *lane.team;
    for (std::uint64_t done = 0;; ++done) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        begin_.wait(lock, [&] { return over_ || launch_ > done; });
        if (over_) return;
      }
      for (int block = t; block < blocks_; block += static_cast<int>(teams_.size())) {
        if (lane.number() == 0) {
          team.memory = static_cast<char*>(std::malloc(static_cast<std::size_t>(bytes_)));
          std::memset(team.memory, 0xff, static_cast<std::size_t>(bytes_));
        }
        team.barrier.wait(team.threads());
        (*job_)(lane, block);
        team.barrier.wait(team.threads());
        if (lane.number() == 0) std::free(team.memory);
      }
      const std::lock_guard<std::mutex> lock(mutex_);
      if (--left_ == 0) end_.notify_one();
    }
  }

  std::vector<Team> teams_;
  std::mutex mutex_;
  std::condition_variable begin_, end_;
  std::uint64_t launch_ = 0;
  int left_ = 0, blocks_ = 0;
  std::int64_t bytes_ = 0;
  bool over_ = false;
  const Job* job_ = nullptr;
  std::vector<std::thread> threads_;
};

}  // namespace threads
}  // namespace kinml::cuda
