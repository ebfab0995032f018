// An own pool would fight with torch's: its idle threads spin for milliseconds after each of its operations, on the
// very cores that attention needs next. So the work goes to those threads, through libgomp's entry point, found at run
// time in the copy that torch has loaded: nothing is linked and no second OpenMP runtime can appear.
#include "threads.h"

#include <dlfcn.h>

#ifdef __linux__
#include <link.h>
#endif

#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace kvwise {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_gomp_parallel() {
#ifdef __linux__
    std::string path;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            if (!std::strstr(info->dlpi_name, "libgomp")) return 0;
            *static_cast<std::string*>(data) = info->dlpi_name;
            return 1;
        },
        &path);
    if (!path.empty()) {
        if (void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD)) {
            return reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
        }
    }
#endif
    return nullptr;
}

struct Job {
    int64_t num_items;
    const std::function<void(int64_t, int)>& body;
    std::atomic<int64_t> next_item{0};
    std::atomic<int> next_worker{0};
    std::mutex mutex;
    std::exception_ptr error;

    void work() {
        const int worker = next_worker.fetch_add(1);
        for (;;) {
            const int64_t item = next_item.fetch_add(1);
            if (item >= num_items) return;
            try {
                body(item, worker);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(mutex);
                if (!error) error = std::current_exception();
            }
        }
    }
};

}  // namespace

void parallel_for(int64_t num_items, int num_threads, const std::function<void(int64_t, int)>& body) {
    static const GompParallel gomp_parallel = find_gomp_parallel();
    if (num_items < num_threads) num_threads = int(num_items);
    Job job{num_items, body};
    if (num_threads <= 1) {
        job.work();
    } else if (gomp_parallel) {
        gomp_parallel([](void* data) { static_cast<Job*>(data)->work(); }, &job, unsigned(num_threads), 0);
    } else {
        std::vector<std::thread> threads;
        for (int i = 1; i < num_threads; ++i) threads.emplace_back([&job] { job.work(); });
        job.work();
        for (std::thread& thread : threads) thread.join();
    }
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace kvwise
