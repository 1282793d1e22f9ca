//! Two bf16 numbers in the memory of one f32, so that collectives of f32 can send weights in bf16.

use crate::ops::slices::CHUNK;
use half::{bf16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

/// Appends `values` to the words, rounded to nearest, ties to even: ⌈len / 2⌉ words.
pub fn pack(values: &[f32], words: &mut Vec<f32>) {
    let start = words.len();
    words.resize(start + values.len().div_ceil(2), 0.0);
    let halves: &mut [bf16] = bytemuck::cast_slice_mut(&mut words[start..]);
    let pairs = halves[..values.len()].par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK));
    pairs.for_each(|(halves, values)| halves.convert_from_f32_slice(values));
}

/// The values that [`pack`] stored in `words`.
pub fn unpack(words: &[f32], values: &mut [f32]) {
    let halves: &[bf16] = bytemuck::cast_slice(words);
    let pairs = values.par_chunks_mut(CHUNK).zip(halves.par_chunks(CHUNK));
    pairs.for_each(|(values, halves)| halves[..values.len()].convert_to_f32_slice(values));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpacking_gives_the_values_rounded_to_bf16() {
        for len in [0, 1, 2, 7, CHUNK, 2 * CHUNK + 3] {
            let mut random = crate::random::Random::keyed(3, "pairs", 0, 0);
            let values: Vec<f32> = (0..len).map(|_| random.normal() as f32).collect();
            let mut words = vec![7.0];
            pack(&values, &mut words);
            assert_eq!(words.len(), 1 + len.div_ceil(2));
            let mut unpacked = vec![0.0; len];
            unpack(&words[1..], &mut unpacked);
            let expected: Vec<f32> = values.iter().map(|value| bf16::from_f32(*value).to_f32()).collect();
            assert_eq!(unpacked, expected);
        }
    }
}
