/* Calls a fuzz target with mutated inputs, where the compiler has no libFuzzer. The order is that of a seed.
 *
 *   target [-runs=N] [-seconds=S] [-seed=K] [-artifact=FILE] INPUT...
 *
 * First every input as it is, then mutations of them, until one of the limits is reached. The target runs in
 * a child process: when that is ended by a sanitizer or a signal, or does not come back from an input for
 * HANG_SECONDS, the parent writes the input to the artifact file and exits with status 1.
 */
#define _DEFAULT_SOURCE
#include "fuzz.h"

#include <inttypes.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MAX_INPUT = 1 << 14, MAX_SEEDS = 4096, MAX_MUTATIONS = 5, HANG_SECONDS = 20 };

/* What the child tells the parent. */
typedef struct {
    volatile uint64_t runs;
    volatile size_t size;
    uint8_t data[MAX_INPUT];
} progress;

typedef struct {
    uint8_t *data;
    size_t size;
} input;

typedef struct {
    input seeds[MAX_SEEDS];
    int num_seeds;
    uint64_t runs, seed;
    double seconds;
    const char *artifact;
} options;

static uint64_t state;

/* xorshift64*: any seed but 0. */
static uint64_t random_bits(void) {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545F4914F6CDD1DU;
}

static size_t below(size_t count) {
    return count == 0 ? 0 : (size_t)(random_bits() % count);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Replaces `old` bytes at `at` by `size` others; what does not fit is left as it is. */
static void replace(input *in, size_t at, size_t old, const uint8_t *data, size_t size) {
    if (at > in->size || old > in->size - at || in->size - old + size > MAX_INPUT) return;
    memmove(in->data + at + size, in->data + at + old, in->size - at - old);
    if (size > 0) memcpy(in->data + at, data, size);
    in->size += size - old;
}

/* Numbers at which parsers go wrong. */
static void interesting(input *in, size_t at) {
    static const int64_t numbers[] = {
        0,          1,          -1,         2,          4,          8,         9,         127,
        128,        255,        256,        -128,       65535,      65536,     INT32_MAX, INT32_MIN,
        UINT32_MAX, 0x7F800000, 0xFF800000, 0x7FC00000, 0x3F800000, INT64_MAX, INT64_MIN, INT32_MAX / 8,
        16777216,   -2,         1000000};
    static const size_t sizes[] = {1, 2, 4, 4, 4, 8};
    int64_t number = numbers[below(sizeof numbers / sizeof *numbers)];
    const size_t size = sizes[below(sizeof sizes / sizeof *sizes)];
    /* Sometimes near what is there already. */
    if (below(3) == 0 && at + sizeof number <= in->size) {
        memcpy(&number, in->data + at, sizeof number);
        number = (int64_t)((uint64_t)number + below(9) - 4);
    }
    if (at + size <= in->size) memcpy(in->data + at, &number, size); /* little endian */
}

static void mutate(input *in, const options *opts) {
    const size_t at = below(in->size);
    const input *other = opts->seeds + below((size_t)opts->num_seeds);
    const size_t from = below(other->size), length = below(other->size - from + 1);
    uint8_t byte = (uint8_t)random_bits();
    switch (below(9)) {
    case 0:
        if (in->size > 0) in->data[at] ^= (uint8_t)(1U << below(8));
        break;
    case 1:
        if (in->size > 0) in->data[at] = byte;
        break;
    case 2:
    case 3:
        interesting(in, at);
        break;
    case 4:
        in->size = at;
        break;
    case 5: /* a part of another input is put in */
        replace(in, at, 0, other->data + from, length);
        break;
    case 6: /* or put over what is there */
        replace(in, at, length < in->size - at ? length : in->size - at, other->data + from, length);
        break;
    case 7:
        replace(in, at, below(in->size - at + 1) % 32, NULL, 0);
        break;
    default:
        replace(in, at, 0, &byte, 1);
    }
}

/* In memory of exactly its size, so that a read beyond it is seen. */
static void run_one(progress *shared, const input *in) {
    memcpy(shared->data, in->data, in->size);
    shared->size = in->size;
    shared->runs++;
    uint8_t *exact = fuzz_memory((int64_t)in->size, 1);
    memcpy(exact, in->data, in->size);
    (void)LLVMFuzzerTestOneInput(exact, in->size);
    free(exact);
}

static void run_all(progress *shared, const options *opts) {
    static uint8_t memory[MAX_INPUT];
    const double end = now() + opts->seconds;
    input in = {memory, 0};
    state = opts->seed;
    for (int i = 0; i < opts->num_seeds; i++)
        run_one(shared, opts->seeds + i);
    while (shared->runs < opts->runs && (opts->seconds <= 0 || now() < end)) {
        const input *seed = opts->seeds + below((size_t)opts->num_seeds);
        memcpy(memory, seed->data, seed->size);
        in.size = seed->size;
        for (size_t count = 1 + below(MAX_MUTATIONS); count > 0; count--)
            mutate(&in, opts);
        run_one(shared, &in);
    }
}

/* Waits for the child. Returns 0 if it went through all inputs. */
static int watch(pid_t child, const progress *shared) {
    uint64_t runs = 0;
    double since = now();
    int status = 0;
    for (;;) {
        const pid_t ended = waitpid(child, &status, WNOHANG);
        if (ended == child) break;
        if (shared->runs != runs) {
            runs = shared->runs;
            since = now();
        } else if (now() - since > HANG_SECONDS) {
            fprintf(stderr, "the target hangs\n");
            kill(child, SIGKILL);
            waitpid(child, &status, 0);
            return 1;
        }
        usleep(2000);
    }
    return !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void read_input(options *opts, const char *name) {
    FILE *file = fopen(name, "rb");
    FUZZ_REQUIRE(file != NULL && opts->num_seeds < MAX_SEEDS);
    input *in = opts->seeds + opts->num_seeds++;
    in->data = fuzz_memory(MAX_INPUT, 1);
    in->size = fread(in->data, 1, MAX_INPUT, file);
    fclose(file);
}

static void keep(const progress *shared, const char *name) {
    FILE *file = fopen(name, "wb");
    FUZZ_REQUIRE(file != NULL);
    FUZZ_REQUIRE(fwrite(shared->data, 1, shared->size, file) == shared->size && fclose(file) == 0);
    fprintf(stderr, "the input is kept in %s (%zu bytes)\n", name, (size_t)shared->size);
}

int main(int count, char **arguments) {
    static options opts = {.runs = UINT64_MAX, .seed = 1, .artifact = "crash"};
    for (int i = 1; i < count; i++) {
        const char *argument = arguments[i];
        if (strncmp(argument, "-runs=", 6) == 0)
            opts.runs = strtoull(argument + 6, NULL, 10);
        else if (strncmp(argument, "-seconds=", 9) == 0)
            opts.seconds = strtod(argument + 9, NULL);
        else if (strncmp(argument, "-seed=", 6) == 0)
            opts.seed = strtoull(argument + 6, NULL, 10) * 2 + 1;
        else if (strncmp(argument, "-artifact=", 10) == 0)
            opts.artifact = argument + 10;
        else
            read_input(&opts, argument);
    }
    FUZZ_REQUIRE(opts.num_seeds > 0);
    progress *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    FUZZ_REQUIRE(shared != MAP_FAILED);
    const double start = now();
    const pid_t child = fork();
    FUZZ_REQUIRE(child >= 0);
    if (child == 0) {
        run_all(shared, &opts);
        exit(0); /* and not _exit: the leak checker runs then */
    }
    const int failed = watch(child, shared);
    printf("%" PRIu64 " runs, %.0f a second\n", shared->runs, (double)shared->runs / (now() - start));
    if (failed) keep(shared, opts.artifact);
    return failed;
}
