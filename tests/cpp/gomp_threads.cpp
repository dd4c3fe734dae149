// OpenMP's runtime, as much of it as csrc/cpu/parallel.h uses, on std::thread.
//
// For the thread sanitizer: it knows how std::thread and std::atomic synchronise, but not how
// libgomp does, and so reports races in any program that uses the latter. These are the functions
// that g++ calls for `#pragma omp parallel for schedule(dynamic, 1)`; linked in libgomp's place.
#include <atomic>
#include <thread>
#include <vector>

namespace {

// The loop of a team: how many of its items are handed out, and one thread's view of it.
struct Member {
  std::atomic<long>* taken = nullptr;  // null outside of a team
  int number = 0;
  long begin = 0, end = 0, step = 1;
};
thread_local Member member;

bool next(long* first, long* last) {
  // Relaxed: that an item is handed out says nothing about the memory of others.
  const long item =
      member.begin + member.step * member.taken->fetch_add(1, std::memory_order_relaxed);
  *first = item;
  *last = item + member.step;
  return item < member.end;
}

}  // namespace

extern "C" {

void GOMP_parallel(void (*function)(void*), void* data, unsigned n_threads, unsigned /*flags*/) {
  std::atomic<long> taken{0};
  const auto work = [&](int number) {
    member = {&taken, number};
    function(data);
    member = {};
  };
  std::vector<std::thread> team;
  for (unsigned i = 1; i < n_threads; ++i) team.emplace_back(work, static_cast<int>(i));
  work(0);
  for (std::thread& thread : team) thread.join();
}

bool GOMP_loop_nonmonotonic_dynamic_start(long begin, long end, long step, long /*chunk = 1*/,
                                          long* first, long* last) {
  member.begin = begin;
  member.end = end;
  member.step = step;
  return next(first, last);
}
bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) {
  return next(first, last);
}
void GOMP_loop_end_nowait() {}

int omp_get_thread_num() {
  return member.number;
}
int omp_in_parallel() {
  return member.taken != nullptr;
}
}
