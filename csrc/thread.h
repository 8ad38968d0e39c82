/* What the threads of the library share: their start, and time. */
#ifndef KALDI_MPI_THREAD_H
#define KALDI_MPI_THREAD_H

#include <pthread.h>

/* Starts a thread with all signals blocked: they are the affair of the caller's threads, and a reader must
 * not be the one that Ctrl-C interrupts. Returns 0 or an errno. */
int km_thread_start(pthread_t *thread, void *(*run)(void *), void *argument);

/* Seconds of a clock that only goes forward. */
double km_seconds(void);

void km_sleep(double seconds);

#endif
