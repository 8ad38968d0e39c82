/* One nnet3 example, gone over by the cursor; the data may be a part of a file. */
#include "example.h"
#include "fuzz.h"

static void read_io(const km_cursor *cursor, const km_nnet_io *io) {
    FUZZ_REQUIRE(io->rows > 0 && io->cols > 0 && io->name_length > 0);
    km_index *indexes = fuzz_memory(io->rows, sizeof *indexes);
    km_io_indexes(cursor, io, indexes);
    free(indexes);
    if (io->sparse) {
        int64_t *first = fuzz_memory((int64_t)io->rows + 1, sizeof *first);
        int32_t *columns = fuzz_memory(io->pairs, sizeof *columns);
        float *values = fuzz_memory(io->pairs, sizeof *values);
        km_io_pairs(cursor, io, first, columns, values);
        FUZZ_REQUIRE(first[0] == 0 && first[io->rows] == io->pairs);
        for (int64_t i = 0; i < io->pairs; i++)
            FUZZ_REQUIRE(columns[i] >= 0 && columns[i] < io->cols);
        free(first);
        free(columns);
        free(values);
    } else {
        km_error error = {0};
        float *values = fuzz_memory((int64_t)io->rows * io->cols, sizeof *values);
        if (km_io_matrix(cursor, io, values, &error) != KM_OK) fuzz_check_error(&error);
        free(values);
    }
}

/* Goes over the example in data, which is what a file has from `begin` on; the file is `more` bytes longer.
 */
static void read_example(const uint8_t *data, size_t size, int64_t begin, int64_t more) {
    const int64_t end = begin + (int64_t)size;
    km_cursor cursor = {.data = data, .begin = begin, .end = end, .size = end + more, .at = begin};
    km_error error = {0};
    int32_t count = 0;
    int status = km_example_open(&cursor, &count, &error);
    for (int32_t i = 0; status == KM_OK && i < count; i++) {
        km_nnet_io io;
        status = km_example_io(&cursor, &io, &error);
        FUZZ_REQUIRE(cursor.at >= begin && cursor.at <= end);
        if (status == KM_OK) read_io(&cursor, &io);
    }
    if (status == KM_OK) status = km_example_close(&cursor, &error);
    FUZZ_REQUIRE(cursor.at >= begin && cursor.at <= end);
    if (status != KM_OK) fuzz_check_error(&error);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    read_example(data, size, 0, 0);
    read_example(data, size, 1000003, 17);
    return 0;
}
