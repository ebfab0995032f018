// Threads borrowed from the OpenMP runtime that torch already runs.
#pragma once

#include <cstdint>
#include <functional>

namespace kvwise {

// Calls body(item, worker) once for each item in [0, num_items), on up to num_threads threads; 0 <= worker <
// num_threads. Items are handed out in order, the next one to whoever is free. The first exception of a body is thrown
// here, after all are done.
void parallel_for(int64_t num_items, int num_threads, const std::function<void(int64_t, int)>& body);

}  // namespace kvwise
