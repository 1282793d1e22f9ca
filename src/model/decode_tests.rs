//! Cached decoding equals the full forward pass.

use super::{
    tests::{CODEBOOK, LISTS, List, case, largest, max_difference},
    *,
};
use crate::{
    error::Result,
    model::Modality::Text,
    ops::{packed::Format, simd::tests::FORCED, testing::at_each_level},
};
use candle_core::{DType, Device, Tensor};
use std::sync::Arc;

/// Error of decoding against the full forward pass, relative to the largest logit (at least 1): the worst of 40 cases.
fn decoding_error(format: Format, fused: bool, lists: &[List]) -> Result<f64> {
    let mut worst: f64 = 0.0;
    for index in 0..40 {
        let mut case = case(index);
        let (generator, _) = case.generator(DType::F32)?;
        let decoder = Decoder::new(Arc::new(generator), format);
        let (texts, codes) = (case.texts(), case.codes());
        // Answers use all their positions and start with [CLS], which is token 2 here.
        let mut answers: Vec<Vec<u32>> = texts.clone();
        for answer in &mut answers {
            answer.resize(case.config.text.max_tokens, 1);
            answer[0] = 2;
        }
        for &list in lists {
            let rows = |&modality: &Modality| (modality, if modality == Text { texts.as_slice() } else { &codes });
            let cls = (list.1 == Text).then_some(2);
            let source = Source::new(list.0.iter().map(rows).collect(), cls);
            let fed = if list.1 == Text {
                answers.iter().map(|text| &text[1..]).collect()
            } else {
                codes.iter().map(|c| &c[..]).collect::<Vec<_>>()
            };
            let expected = decoder.generator().logits(&case.fill(list, &texts, &answers, &codes)?)?;
            let (mut state, mut logits) = decoder.start_on(&source, fused)?;
            for i in 0..expected.dim(1)? {
                if i > 0 {
                    let tokens: Vec<u32> = fed.iter().map(|tokens| tokens[i - 1]).collect();
                    logits = state.logits_next(&tokens)?.to_vec();
                }
                let expected = expected.narrow(1, i, 1)?.squeeze(1)?;
                let logits = Tensor::from_slice(&logits, expected.shape(), &Device::Cpu)?;
                worst = worst.max(max_difference(&logits, &expected)? / largest(&expected)?.max(1.0));
            }
            assert!(state.logits_next(&vec![0; case.batch]).is_err(), "the sequences are complete");
        }
    }
    Ok(worst)
}

#[test]
fn cached_attention_is_block_attention() -> Result<()> {
    let (composed, fused) = (decoding_error(Format::F32, false, &LISTS)?, decoding_error(Format::F32, true, &LISTS)?);
    assert!(composed < 1e-4 && fused < 1e-4, "{composed} {fused}");
    Ok(())
}

/// These models are small and have large weights with non-zero means, so that errors do not average out.
#[test]
fn the_error_of_packed_weights_is_that_of_their_format() -> Result<()> {
    let (bf16, int8) =
        (decoding_error(Format::Bf16, true, &LISTS[..2])?, decoding_error(Format::Int8, true, &LISTS[..2])?);
    assert!((1e-4..0.03).contains(&bf16) && (1e-4..0.08).contains(&int8), "{bf16} {int8}");
    Ok(())
}

#[test]
fn reordered_sequences_continue_as_copies() -> Result<()> {
    for (index, fused) in (0..8).flat_map(|index| [(index, true), (index, false)]) {
        let mut case = case(index);
        (case.batch, case.grid) = (3, (2, 3));
        let decoder = Decoder::new(Arc::new(case.generator(DType::F32)?.0), Format::F32);
        let (texts, codes) = (case.texts(), case.codes());
        let order = [2, 0, 0, 1];
        let run = |reorder_at: usize| -> Result<Vec<f32>> {
            let (mut state, mut logits) = decoder.start_on(&Source::text_to_image(&texts), fused)?;
            let columns = (0..5).map(|i| codes.iter().map(|row| row[i]).collect::<Vec<_>>());
            for (i, column) in columns.enumerate() {
                if i == reorder_at {
                    state.reorder(&order)?;
                }
                let rows = if i < reorder_at { vec![0, 1, 2] } else { order.to_vec() };
                let tokens: Vec<u32> = rows.iter().map(|&row: &usize| column[row]).collect();
                logits = state.logits_next(&tokens)?.to_vec();
            }
            Ok(logits)
        };
        let early = run(0)?;
        for at in 1..5 {
            let gap = early.iter().zip(run(at)?).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            assert!(if fused { gap == 0.0 } else { gap < 1e-5 }, "{gap}");
        }
        let (mut state, _) = decoder.start(&Source::text_to_image(&texts))?;
        assert!(state.reorder(&[3]).is_err() && state.reorder(&[]).is_err() && state.logits_next(&[0]).is_err());
        let nothing = decoder.start(&Source::text_to_image(&[]));
        assert!(state.logits_next(&[0, 0, CODEBOOK as u32]).is_err() && nothing.is_err());
    }
    Ok(())
}

/// Bit-equal alone and in a batch, on one thread and on four, at every instruction set.
#[test]
fn a_sequence_does_not_depend_on_the_batch() -> Result<()> {
    at_each_level(|| {
        let mut case = case(2);
        (case.batch, case.grid) = (9, (2, 3));
        let decoder = Decoder::new(Arc::new(case.generator(DType::F32)?.0), Format::F32);
        let (texts, codes) = (case.texts(), case.codes());
        let run = |rows: &[usize]| -> Result<Vec<Vec<f32>>> {
            let texts: Vec<_> = rows.iter().map(|&row| texts[row].clone()).collect();
            let (mut state, first) = decoder.start(&Source::text_to_image(&texts))?;
            let mut all: Vec<Vec<f32>> = first.chunks(CODEBOOK).map(<[f32]>::to_vec).collect();
            for columns in (0..5).map(|i| codes.iter().map(|row| row[i]).collect::<Vec<_>>()) {
                let tokens: Vec<u32> = rows.iter().map(|&row| columns[row]).collect();
                let logits = state.logits_next(&tokens)?.chunks(CODEBOOK);
                all.iter_mut().zip(logits).for_each(|(all, logits)| all.extend(logits));
            }
            Ok(all)
        };
        let rows: Vec<usize> = (0..9).collect();
        let together = run(&rows)?;
        for row in rows.clone() {
            assert!(run(&[row])?[0] == together[row], "sequence {row}");
        }
        let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build()?;
        let level = FORCED.get();
        pool.broadcast(|_| FORCED.set(level));
        assert!(pool.install(|| run(&rows))? == together);
        Ok(())
    })
}

/// Sequences join a running batch at any step and leave it when they are complete, or earlier: bit-equal to a batch of
/// their own.
#[test]
fn sequences_of_a_running_batch_do_not_depend_on_each_other() -> Result<()> {
    for (index, fused) in (0..12).flat_map(|index| [(index, true), (index, false)]) {
        let mut case = case(index);
        (case.batch, case.grid) = (7, (2, 3));
        let decoder = Decoder::new(Arc::new(case.generator(DType::F32)?.0), Format::F32);
        let (texts, codes) = (case.texts(), case.codes());
        let alone = |row: usize| -> Result<Vec<Vec<f32>>> {
            let (mut state, first) = decoder.start_on(&Source::text_to_image(&texts[row..=row]), fused)?;
            let rest = codes[row][..5].iter().map(|&code| Ok(state.logits_next(&[code])?.to_vec()));
            std::iter::once(Ok(first)).chain(rest).collect()
        };
        let mut running = decoder.running_on(fused)?;
        // The number of each sequence in the batch, and its logits so far.
        let (mut members, mut found): (Vec<usize>, Vec<Vec<Vec<f32>>>) = (Vec::new(), vec![Vec::new(); 7]);
        let joining = [2, 0, 1, 3, 0, 0, 0, 1];
        let mut waiting = 0..7;
        for step in 0..40 {
            for row in waiting.by_ref().take(*joining.get(step).unwrap_or(&0)) {
                running.join(&texts[row])?;
                members.push(row);
            }
            // Sequence 4 is given up in the middle.
            let goes_on = |row: usize| found[row].len() < if row == 4 { 3 } else { 6 };
            let kept: Vec<usize> = (0..members.len()).filter(|&i| goes_on(members[i])).collect();
            members = kept.iter().map(|&i| members[i]).collect();
            running.keep(&kept)?;
            assert_eq!(running.sequences(), members.len());
            if members.is_empty() {
                assert!(running.step(&[]).is_err());
                continue;
            }
            let last = |&row: &usize| found[row].len().checked_sub(1).map_or(0, |last| codes[row][last]);
            let tokens: Vec<u32> = members.iter().map(last).collect();
            let logits = running.step(&tokens)?.chunks(CODEBOOK);
            members.iter().zip(logits).for_each(|(&row, logits)| found[row].push(logits.to_vec()));
        }
        assert!(waiting.next().is_none());
        for (row, found) in found.iter().enumerate() {
            assert_eq!(found.len(), if row == 4 { 3 } else { 6 });
            assert!(found[..] == alone(row)?[..found.len()], "sequence {row} of case {index}, fused: {fused}");
        }
        running.join(&texts[0])?;
        assert!(running.join(&[]).is_err() && running.join(&[9999, 1]).is_err() && running.sequences() == 1);
        assert!(running.keep(&[1]).is_err() && running.step(&[0, 0]).is_err());
        (0..6).try_for_each(|_| running.step(&[0]).map(|_| ()))?;
        assert!(running.step(&[0]).is_err(), "the sequence is complete");
    }
    Ok(())
}
