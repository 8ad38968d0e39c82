/* A chain example's part in the index of its archive. */
#ifndef KALDI_MPI_CHAIN_SCAN_H
#define KALDI_MPI_CHAIN_SCAN_H

#include "chain_example.h"
#include "egs_index.h"

/* Adds the example at the cursor to the index, as one unit; `output` is the name of the output that counts.
 * After a failure the index may have part of it. */
int km_chain_scan(km_cursor *cursor, const char *output, km_egs_index *index, km_scratch *scratch,
                  km_error *error);

#endif
