// Runs numbered tasks on the threads of torch's own OpenMP runtime.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace polytrope {
namespace {

// GOMP_parallel of the OpenMP runtime that torch has loaded: its threads are used, no second pool competes with them.
typedef void (*ParallelRegion)(void (*)(void*), void*, unsigned, unsigned);

struct Work {
  std::atomic<int64_t> next{0};
  int64_t tasks = 0, batch = 1;
  void* context = nullptr;
  void (*run)(void*, int64_t) = nullptr;
};

void take_tasks(void* pointer) {
  Work& work = *static_cast<Work*>(pointer);
  for (;;) {
    const int64_t first = work.next.fetch_add(work.batch);
    if (first >= work.tasks) return;
    for (int64_t task = first; task < std::min(first + work.batch, work.tasks); ++task) work.run(work.context, task);
  }
}

template <class Body>
void run_tasks(int64_t tasks, int64_t batch, int threads, ParallelRegion region, const Body& body) {
  Work work;
  work.tasks = tasks;
  work.batch = batch;
  work.context = const_cast<void*>(static_cast<const void*>(&body));
  work.run = [](void* context, int64_t task) { (*static_cast<const Body*>(context))(task); };
  threads = int(std::min<int64_t>(threads, (tasks + batch - 1) / batch));
  if (threads <= 1) {
    take_tasks(&work);
  } else if (region) {
    region(take_tasks, &work, unsigned(threads), 0);
  } else {
    std::vector<std::thread> helpers;
    for (int k = 1; k < threads; ++k) helpers.emplace_back(take_tasks, &work);
    take_tasks(&work);
    for (std::thread& helper : helpers) helper.join();
  }
}

}  // namespace
}  // namespace polytrope
