/* One example of chain (LF-MMI) training, parsed from memory:
 *
 *   \0 B <Nnet3ChainEg> <NumInputs> int32, for each input what example.h says of it,
 *   <NumOutputs> int32, then for each output
 *     <NnetChainSup> name <I1V> int32 n, n encoded Index, supervision (supervision.h),
 *     <DW2> vector (FV or DV) or <DW> size byte 1, int32 count and bytes that are 255 times the weights, or
 *     neither; </NnetChainSup>
 *   </Nnet3ChainEg>
 *
 * An example has one sequence, or, merged, several of the same size. The rows of `input` are those of the
 * first sequence in order of time, then those of the second, and so on; `ivector` has a row for each. An
 * output has an Index for each sequence at the first output frame, then at the second: n is the sequence, and
 * t rises by the frame subsampling factor. Derivative weights are in this order too.
 */
#ifndef KALDI_MPI_CHAIN_EXAMPLE_H
#define KALDI_MPI_CHAIN_EXAMPLE_H

#include "corpus.h"
#include "example.h"
#include "supervision.h"

/* An output; name_length 0: there is no such one. */
typedef struct {
    km_nnet_io io; /* without a matrix */
    km_supervision supervision;
    int32_t first_t, subsampling; /* t of the first frame, and from one to the next (1 where there is one) */
    int64_t weights;              /* offset of the first derivative weight */
    int32_t weight_bytes;         /* of each: 1, 4 or 8; 0: there are none, and all are 1 */
} km_chain_output;

/* What an example has been found to be. */
typedef struct {
    km_nnet_io input, ivector; /* ivector.name_length 0: there is none */
    km_chain_output output;
    km_shape shape;
} km_chain_example;

/* Goes over an example at the cursor and checks all of it, but for values of full matrices and derivative
 * weights. `output` is the name of the output that counts; the scratch is used on the way. */
int km_chain_example_take(km_cursor *cursor, const char *output, km_chain_example *found, km_scratch *scratch,
                          km_error *error);

/* Derivative weight of a row of the output, 0 <= row < io.rows. */
float km_chain_weight(const km_cursor *cursor, const km_chain_output *output, int32_t row);

#endif
