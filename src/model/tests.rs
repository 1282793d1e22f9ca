//! dense ≡ block ≡ cached, forward and gradient, and gradients against finite differences.

use super::{
    transformer::{TapedHead, TapedLayer},
    *,
};
use crate::{
    config::{AttentionKind, Config, ConvBorder, Precision, RowExtent},
    error::Result,
    nn::{
        attention::dense_masked,
        params::{Params, Scope},
        pattern::{Grid, Pattern, tests::all_patterns},
        segment::Taped,
    },
    ops::{packed::Format, simd::tests::FORCED, testing::at_each_level},
    random::Random,
};
use candle_core::{DType, Device, Tensor};

pub(super) const VOCAB: usize = 13;
pub(super) const CODEBOOK: usize = 11;

pub(super) struct Case {
    pub(super) config: Config,
    pub(super) grid: (usize, usize),
    pub(super) batch: usize,
    random: Random,
}

/// The `index`-th random model and batch shape; the patterns, options and small grids all come up.
pub(super) fn case(index: u64) -> Case {
    let mut random = Random::keyed(5, "case", 0, index);
    let mut below = |bound: u64| random.below(bound) as usize;
    let mut config = Config::default();
    let model = &mut config.model;
    model.heads = 1 + below(3);
    model.hidden = model.heads * 4;
    model.layers = 1 + below(4);
    model.mlp_ratio = 2;
    model.attention = if below(8) == 0 { AttentionKind::Dense } else { AttentionKind::Sparse };
    model.row_extent = [RowExtent::Window, RowExtent::SameRow][below(2)];
    model.conv_border = [ConvBorder::Clip, ConvBorder::RasterWrap][below(2)];
    model.conv_size = [1, 3, 5, 11][below(4)];
    model.qk_norm = below(3) == 0;
    model.sandwich_norm = below(3) == 0;
    config.text.max_tokens = 2 + below(6);
    let grid = (1 + below(5), 1 + below(5));
    let batch = 1 + below(3);
    Case { config, grid, batch, random }
}

impl Case {
    /// Weights as if trained a while: biases and norms are random as well, logits are not flat.
    pub(super) fn generator(&self, dtype: DType) -> Result<(Generator, Params)> {
        let scope = Scope::from_seed(1, dtype, &Device::Cpu);
        let generator = Generator::new(&scope, &self.config, VOCAB, CODEBOOK, self.grid)?;
        for (i, var) in scope.params().values().enumerate() {
            let mut random = Random::keyed(2, "weights", 0, i as u64);
            let noise: Vec<f64> = (0..var.elem_count()).map(|_| random.normal() * 0.3).collect();
            let noise = Tensor::from_vec(noise, var.shape(), &Device::Cpu)?.to_dtype(dtype)?;
            var.set(&(var.as_tensor() + noise)?)?;
        }
        Ok((generator, scope.params()))
    }

    pub(super) fn texts(&mut self) -> Vec<Vec<u32>> {
        let max = self.config.text.max_tokens as u64;
        let lengths: Vec<u64> = (0..self.batch).map(|_| 2 + self.random.below(max - 1)).collect();
        lengths.iter().map(|&n| (0..n).map(|_| self.random.below(VOCAB as u64) as u32).collect()).collect()
    }

    pub(super) fn codes(&mut self) -> Vec<Vec<u32>> {
        let n = self.grid.0 * self.grid.1;
        let mut code = || self.random.below(CODEBOOK as u64) as u32;
        (0..self.batch).map(|_| (0..n).map(|_| code()).collect()).collect()
    }

    pub(super) fn batch(&self, direction: Direction, texts: &[Vec<u32>], codes: &[Vec<u32>]) -> Result<Batch> {
        let (text, text_lengths) = pad(texts, self.config.text.max_tokens, 0, &Device::Cpu)?;
        let (codes, _) = pad(codes, self.grid.0 * self.grid.1, 0, &Device::Cpu)?;
        Ok(Batch { direction, text, text_lengths, codes, loss_scale: 0.5 })
    }
}

fn loss(generator: &Generator, batch: &Batch) -> Result<Tensor> {
    let mut x = generator.embedding.taped(&batch.codes, batch)?;
    for layer in &generator.layers {
        x = TapedLayer { layer, precision: Precision::F32 }.taped(&x, batch)?;
    }
    TapedHead { head: &generator.head, precision: Precision::F32 }.taped(&x, batch)
}

/// The loss with attention against full masks.
fn dense_loss(generator: &Generator, batch: &Batch) -> Result<Tensor> {
    let layout = generator.layout(batch.direction);
    let mut x = generator.embedding.taped(&batch.codes, batch)?;
    for layer in &generator.layers {
        let mask = layout.mask(layer.pattern, &batch.text_lengths, x.device())?;
        x = layer.block.forward_with(Precision::F32, &x, |qkv| dense_masked(qkv, &mask))?;
    }
    TapedHead { head: &generator.head, precision: Precision::F32 }.taped(&x, batch)
}

fn max_difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    let difference = (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?.abs()?.flatten_all()?;
    Ok(difference.max(0)?.to_scalar::<f64>()?)
}

fn largest(a: &Tensor) -> Result<f64> {
    Ok(a.to_dtype(DType::F64)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()?)
}

#[test]
fn key_lists_are_the_mask_rule() {
    for direction in [Direction::TextToImage, Direction::ImageToText] {
        for (text, height, width) in [(2, 1, 1), (3, 3, 4), (5, 4, 3), (4, 1, 5), (2, 5, 1)] {
            let layout = Layout { direction, text, grid: Grid { height, width } };
            for (pattern, length) in all_patterns().into_iter().flat_map(|p| (1..=text).map(move |l| (p, l))) {
                let keys = layout.keys(pattern, &[length]);
                for query in 0..layout.positions() {
                    let runs = &keys.runs[keys.offsets[query]..keys.offsets[query + 1]];
                    let listed = runs.iter().flat_map(|r| (0..r.len).map(move |i| r.start + i * r.stride));
                    let cut = |&key: &usize| keys.text_lengths.is_none() || !keys.text.contains(&key) || key < length;
                    let listed: Vec<_> = listed.filter(cut).collect();
                    let visible = (0..layout.positions()).filter(|&key| layout.visible(pattern, length, query, key));
                    assert_eq!(listed, visible.collect::<Vec<_>>(), "{layout:?} {pattern:?} {query}");
                }
            }
        }
    }
}

#[test]
fn a_small_mask_by_hand() {
    let rows = |direction| {
        let layout = Layout { direction, text: 3, grid: Grid { height: 2, width: 2 } };
        let row =
            |q| (0..layout.positions()).map(move |k| u8::from(layout.visible(Pattern::Column, 2, q, k)).to_string());
        (0..layout.positions()).map(|q| row(q).collect::<String>()).collect::<Vec<_>>()
    };
    // [CLS] [SEP] [PAD] | start z1 z2 z3
    let painting = ["1100000", "1100000", "1100000", "1101000", "1101100", "1101010", "1101101"];
    assert_eq!(rows(Direction::TextToImage), painting);
    // z1 z2 z3 z4 | [CLS] token
    assert_eq!(rows(Direction::ImageToText), ["101000", "010100", "101000", "010100", "111110", "111111"]);
}

#[test]
fn block_attention_is_dense_attention() -> Result<()> {
    for index in 0..40 {
        let mut case = case(index);
        let (generator, params) = case.generator(DType::F64)?;
        let (texts, codes) = (case.texts(), case.codes());
        for direction in [Direction::TextToImage, Direction::ImageToText] {
            let batch = case.batch(direction, &texts, &codes)?;
            let (block, dense) = (loss(&generator, &batch)?, dense_loss(&generator, &batch)?);
            assert!(max_difference(&block, &dense)? < 1e-10, "case {index} {direction:?}");
            let (block, dense) = (block.backward()?, dense.backward()?);
            for (name, var) in &params {
                match (block.get(var), dense.get(var)) {
                    (Some(block), Some(dense)) => {
                        let bound = 1e-9 * largest(dense)?.max(1e-3);
                        assert!(max_difference(block, dense)? < bound, "case {index} {direction:?} {name}");
                    }
                    (block, dense) => assert_eq!(block.is_some(), dense.is_some(), "{name}"),
                }
            }
        }
    }
    Ok(())
}

/// How far decoding is from the whole forward pass, of the largest logit (at least 1), in the worst of 40 cases.
fn decoding_error(format: Format, fused: bool) -> Result<f64> {
    let mut worst: f64 = 0.0;
    for index in 0..40 {
        let mut case = case(index);
        let (generator, _) = case.generator(DType::F32)?;
        let generator = generator.decode_in(format);
        let (mut texts, codes) = (case.texts(), case.codes());
        for direction in [Direction::TextToImage, Direction::ImageToText] {
            let (source, fed) = match direction {
                Direction::TextToImage => (Source::Text(&texts), codes.clone()),
                Direction::ImageToText => {
                    let width = case.config.text.max_tokens;
                    texts.iter_mut().for_each(|text| text.resize(width, 1));
                    texts.iter_mut().for_each(|text| text[0] = 2);
                    (Source::Image { codes: &codes, cls: 2 }, texts.iter().map(|text| text[1..].to_vec()).collect())
                }
            };
            let expected = generator.logits(&case.batch(direction, &texts, &codes)?)?;
            let (mut state, mut logits) = generator.start(source, fused)?;
            for i in 0..expected.dim(1)? {
                if i > 0 {
                    let tokens: Vec<u32> = fed.iter().map(|tokens| tokens[i - 1]).collect();
                    logits = state.logits_next(&tokens)?.to_vec();
                }
                let expected = expected.narrow(1, i, 1)?.squeeze(1)?;
                let logits = Tensor::from_slice(&logits, expected.shape(), &Device::Cpu)?;
                worst = worst.max(max_difference(&logits, &expected)? / largest(&expected)?.max(1.0));
            }
            assert!(state.logits_next(&vec![0; case.batch]).is_err(), "the sequences are full");
        }
    }
    Ok(worst)
}

#[test]
fn cached_attention_is_block_attention() -> Result<()> {
    let (composed, fused) = (decoding_error(Format::F32, false)?, decoding_error(Format::F32, true)?);
    assert!(composed < 1e-4 && fused < 1e-4, "{composed} {fused}");
    Ok(())
}

/// These models are small, of large weights and off-centre: no error averages out.
#[test]
fn packed_weights_cost_what_their_format_costs() -> Result<()> {
    let (bf16, int8) = (decoding_error(Format::Bf16, true)?, decoding_error(Format::Int8, true)?);
    assert!((1e-4..0.03).contains(&bf16) && (1e-4..0.08).contains(&int8), "{bf16} {int8}");
    Ok(())
}

#[test]
fn reordered_sequences_go_on_as_copies() -> Result<()> {
    for (index, fused) in (0..8).flat_map(|index| [(index, true), (index, false)]) {
        let mut case = case(index);
        (case.batch, case.grid) = (3, (2, 3));
        let (generator, _) = case.generator(DType::F32)?;
        let (texts, codes) = (case.texts(), case.codes());
        let order = [2, 0, 0, 1];
        let run = |reorder_at: usize| -> Result<Vec<f32>> {
            let (mut state, mut logits) = generator.start(Source::Text(&texts), fused)?;
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
        let (mut state, _) = generator.decode_start(Source::Text(&texts))?;
        assert!(state.reorder(&[3]).is_err() && state.reorder(&[]).is_err() && state.logits_next(&[0]).is_err());
        assert!(
            state.logits_next(&[0, 0, CODEBOOK as u32]).is_err() && generator.decode_start(Source::Text(&[])).is_err()
        );
    }
    Ok(())
}

/// The same bits alone and among others, on one thread and on four, at every instruction set.
#[test]
fn a_sequence_depends_on_itself_alone() -> Result<()> {
    at_each_level(|| {
        let mut case = case(2);
        (case.batch, case.grid) = (9, (2, 3));
        let (generator, _) = case.generator(DType::F32)?;
        let (texts, codes) = (case.texts(), case.codes());
        let run = |rows: &[usize]| -> Result<Vec<Vec<f32>>> {
            let texts: Vec<_> = rows.iter().map(|&row| texts[row].clone()).collect();
            let (mut state, first) = generator.decode_start(Source::Text(&texts))?;
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

/// Every parameter's gradient along a random direction, in double precision.
#[test]
fn gradients_are_finite_differences() -> Result<()> {
    for index in [1, 2, 3, 4] {
        let mut case = case(index);
        case.config.model.qk_norm = index % 2 == 0;
        case.config.model.sandwich_norm = index > 2;
        let (generator, params) = case.generator(DType::F64)?;
        let (texts, codes) = (case.texts(), case.codes());
        let batches = [Direction::TextToImage, Direction::ImageToText].map(|d| case.batch(d, &texts, &codes));
        let [painting, captioning] = [batches[0].as_ref(), batches[1].as_ref()].map(|b| b.expect("a valid batch"));
        let total = || -> Result<Tensor> { Ok((loss(&generator, painting)? + loss(&generator, captioning)?)?) };
        let gradients = total()?.backward()?;
        for (name, var) in &params {
            let gradient = gradients.get(var).unwrap_or_else(|| panic!("{name} has no gradient"));
            let direction: Vec<f64> = (0..var.elem_count()).map(|_| case.random.normal()).collect();
            let direction = Tensor::from_vec(direction, var.shape(), &Device::Cpu)?;
            let (start, step) = (var.as_tensor().copy()?, 1e-5);
            let at = |t: f64| -> Result<f64> {
                var.set(&(&start + (&direction * t)?)?)?;
                Ok(total()?.to_scalar::<f64>()?)
            };
            let difference = (at(step)? - at(-step)?) / (2.0 * step);
            at(0.0)?;
            let expected = (gradient * &direction)?.sum_all()?.to_scalar::<f64>()?;
            assert!((difference - expected).abs() < 1e-6 * expected.abs().max(1.0), "{name}: {difference} {expected}");
        }
    }
    Ok(())
}

#[test]
fn padding_changes_nothing_and_is_not_predicted() -> Result<()> {
    let mut case = case(3);
    (case.config.text.max_tokens, case.batch) = (6, 1);
    let (generator, _) = case.generator(DType::F32)?;
    let codes = case.codes();
    for direction in [Direction::TextToImage, Direction::ImageToText] {
        let batch = case.batch(direction, &[vec![2, 7, 3]], &codes)?;
        let mut other = batch.clone();
        other.text = Tensor::new(&[[2u32, 7, 3, 9, 9, 9]], &Device::Cpu)?;
        assert_eq!(max_difference(&loss(&generator, &batch)?, &loss(&generator, &other)?)?, 0.0);
        assert_eq!(batch.targets(), if direction == Direction::TextToImage { codes[0].len() } else { 2 });
    }
    Ok(())
}

#[test]
fn parameters_have_the_documented_names() -> Result<()> {
    let mut case = case(0);
    (case.config.model.layers, case.config.model.qk_norm, case.config.model.sandwich_norm) = (1, true, true);
    let (generator, params) = case.generator(DType::F32)?;
    let pairs = |stems: &[&str]| -> Vec<String> {
        stems.iter().flat_map(|stem| ["weight", "bias"].map(|part| format!("{stem}.{part}"))).collect()
    };
    let tables = ["text_embedding", "text_position", "image_embedding", "image_row", "image_column"];
    let mut expected: Vec<String> = tables.iter().map(|table| format!("{table}.weight")).collect();
    expected.push("image_start".into());
    expected.extend(pairs(&["norm", "text_head", "image_head"]));
    let block = ["norm1", "norm1_post", "norm2", "norm2_post", "mlp.fc1", "mlp.fc2"];
    expected.extend(pairs(&block).iter().map(|name| format!("blocks.0.{name}")));
    let attention = ["qkv", "proj", "q_norm", "k_norm"];
    expected.extend(pairs(&attention).iter().map(|name| format!("blocks.0.attention.{name}")));
    expected.sort();
    assert_eq!(params.keys().cloned().collect::<Vec<_>>(), expected);
    let counted: u64 = size::generator(&case.config, VOCAB, CODEBOOK, case.grid).iter().map(|part| part.1).sum();
    assert_eq!(params.values().map(|var| var.elem_count() as u64).sum::<u64>(), counted);
    // The segments share the parameters out without rest or overlap.
    let mut shared: Vec<String> = generator.segments().iter().flat_map(|s| s.params().keys().cloned()).collect();
    shared.sort();
    assert_eq!(shared, expected);
    Ok(())
}
