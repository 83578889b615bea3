// Tasks go to threads as these come free, in one visit to torch's pool. Its threads sleep between operators, and waking
// one takes as long as a small operator: the caller begins at once, and who wakes takes what is left.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <thread>

namespace hypersd {

// run(begin, end) over [0, count), by torch's pool. Its C interface drops what an error says: the first is thrown here.
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& run) {
  std::exception_ptr error;
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    try {
      run(begin, end);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// How many threads `elements` are worth, a share of `least` each.
inline int64_t threads_for(int64_t elements, int64_t least) {
  return std::clamp<int64_t>(elements / least, 1, torch::stable::get_num_threads());
}

// work(worker) for the workers [0, threads), all of them on one thread if the pool gives no other.
template <class F>
void on_threads(int64_t threads, const F& work) {
  if (threads < 2) return work(0);
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) work(worker);
  });
}

// run(task, worker) for the tasks [0, count).
template <class F>
void over_tasks(int64_t count, int64_t threads, const F& run) {
  std::atomic<int64_t> next{0};
  on_threads(std::min(threads, count), [&](int64_t worker) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) run(task, worker);
  });
}

// Two passes over the pieces of every sample: first(piece, worker) for all of them, then finish(sample, worker) once, then
// second(piece, worker). Workers start at pieces far apart; in the second pass each starts with the piece it had last and
// goes back, while its cache still has them. Nothing here may throw: a worker waits for pieces that others have begun.
template <class First, class Finish, class Second>
void two_passes(int64_t samples, int64_t pieces, int64_t threads, const First& first, const Finish& finish,
                const Second& second) {
  threads = std::min(threads, pieces);
  std::unique_ptr<std::atomic<bool>[]> taken(new std::atomic<bool>[2 * samples * pieces]());
  std::unique_ptr<std::atomic<int64_t>[]> done(new std::atomic<int64_t>[samples]());  // pieces, and one for finish
  const auto take = [&](int64_t i) { return !taken[i].exchange(true, std::memory_order_relaxed); };
  on_threads(threads, [&](int64_t worker) {
    for (int64_t n = 0; n < samples; ++n) {
      int64_t at = worker * pieces / threads;
      const int64_t start = at;
      for (int64_t k = 0; k < pieces; ++k) {
        const int64_t i = (start + k) % pieces;
        if (!take(2 * n * pieces + i)) continue;
        first(n * pieces + i, worker);
        at = i;
        if (done[n].fetch_add(1, std::memory_order_acq_rel) + 1 < pieces) continue;
        finish(n, worker);
        done[n].fetch_add(1, std::memory_order_release);
      }
      while (done[n].load(std::memory_order_acquire) <= pieces) std::this_thread::yield();
      for (int64_t k = 0; k < pieces; ++k) {
        const int64_t i = (at + pieces - k) % pieces;
        if (take((2 * n + 1) * pieces + i)) second(n * pieces + i, worker);
      }
    }
  });
}

}  // namespace hypersd
