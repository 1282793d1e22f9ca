//! Dense attention equals block attention, forward and backward; gradients equal finite differences.

use super::{head::AutogradHead, segments::AutogradLayer, *};
use crate::{
    config::{AttentionKind, Config, ConvBorder, Precision, RowExtent},
    error::Result,
    nn::{
        attention::dense_masked,
        params::{Params, Scope},
        pattern::{Grid, Pattern, tests::all_patterns},
        segment::Autograd,
    },
    random::Random,
};
use candle_core::{DType, Device, Tensor};

pub(super) const VOCAB: usize = 13;
pub(super) const CODEBOOK: usize = 11;

/// The modalities of a list of spans: sources and target.
pub(super) type List = (&'static [Modality], Modality);

use Modality::{Image, Text};
pub(super) const TEXT_TO_IMAGE: List = (&[Text], Image);
pub(super) const IMAGE_TO_TEXT: List = (&[Image], Text);
pub(super) const VISUAL_QUESTION: List = (&[Image, Text], Text);
pub(super) const KINDS: [List; 3] = [TEXT_TO_IMAGE, IMAGE_TO_TEXT, VISUAL_QUESTION];
/// All lists of spans that a sequence can have.
pub(super) const LISTS: [List; 5] =
    [TEXT_TO_IMAGE, IMAGE_TO_TEXT, VISUAL_QUESTION, (&[Text, Image], Text), (&[Text], Text)];

/// The spans of a list, with the lengths of its source text, its target text and its image.
pub(super) fn spans((sources, target): List, [source_text, target_text, image]: [usize; 3]) -> Vec<Span> {
    let span = |modality, role| match (modality, role) {
        (Image, _) => Span::image(role, image),
        (Text, Role::Source) => Span::text(role, source_text),
        (Text, Role::Target) => Span::text(role, target_text),
    };
    sources.iter().map(|&modality| span(modality, Role::Source)).chain([span(target, Role::Target)]).collect()
}

pub(super) struct Case {
    pub(super) config: Config,
    pub(super) grid: (usize, usize),
    pub(super) batch: usize,
    random: Random,
}

/// The random model and batch shape number `index`. The cases together cover all patterns, options and small grids.
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
    /// Random weights as after some training: biases and norms are random as well, and logits are not uniform.
    pub(super) fn generator(&self, dtype: DType) -> Result<(Generator, Params)> {
        let scope = Scope::from_seed(1, dtype, &Device::Cpu);
        let generator = Generator::in_training(&scope, &self.config, VOCAB, CODEBOOK, self.grid)?;
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

    /// Sequences with these texts. If both source and target are text, the target has the texts in reverse order.
    pub(super) fn batch(&self, list: List, texts: &[Vec<u32>], codes: &[Vec<u32>]) -> Result<Batch> {
        let reversed = texts.iter().rev().map(|text| text.iter().rev().copied().collect()).collect::<Vec<_>>();
        let targets = if list.0.contains(&Text) { &reversed } else { texts };
        self.fill(list, texts, targets, codes)
    }

    pub(super) fn fill(
        &self,
        list: List,
        texts: &[Vec<u32>],
        targets: &[Vec<u32>],
        codes: &[Vec<u32>],
    ) -> Result<Batch> {
        let (most, cells) = (self.config.text.max_tokens, self.grid.0 * self.grid.1);
        let longest = targets.iter().map(Vec::len).max().unwrap_or(0);
        let spans = spans(list, [most, longest, cells]);
        let tokens = |span: &Span| match (span.modality, span.role) {
            (Image, _) => Tokens::pad(codes, cells, 0, &Device::Cpu),
            (Text, Role::Source) => Tokens::pad(texts, most, 0, &Device::Cpu),
            (Text, Role::Target) => Tokens::pad(targets, longest, 0, &Device::Cpu),
        };
        let mut batch = Batch::new(&spans, spans.iter().map(tokens).collect::<Result<_>>()?)?;
        batch.loss_scale = 0.5;
        Ok(batch)
    }
}

fn loss(generator: &Generator, batch: &Batch) -> Result<Tensor> {
    let mut x = generator.embedding.autograd(&batch.target().1.ids, batch)?;
    for layer in &generator.layers {
        x = AutogradLayer { layer, precision: Precision::F32 }.autograd(&x, batch)?;
    }
    AutogradHead { head: &generator.head, precision: Precision::F32 }.loss(&x, batch)
}

/// The loss with dense attention under full masks.
fn dense_loss(generator: &Generator, batch: &Batch) -> Result<Tensor> {
    let layout = batch.layout(generator.grid())?;
    let lengths = match batch.source_lengths() {
        [] => vec![0; batch.samples()],
        lengths => lengths.to_vec(),
    };
    let mut x = generator.embedding.autograd(&batch.target().1.ids, batch)?;
    for layer in &generator.layers {
        let mask = layout.mask(layer.pattern, &lengths, x.device())?;
        x = layer.block.forward_with(Precision::F32, &x, |qkv| dense_masked(qkv, &mask))?;
    }
    AutogradHead { head: &generator.head, precision: Precision::F32 }.loss(&x, batch)
}

pub(super) fn max_difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    let difference = (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?.abs()?.flatten_all()?;
    Ok(difference.max(0)?.to_scalar::<f64>()?)
}

pub(super) fn largest(a: &Tensor) -> Result<f64> {
    Ok(a.to_dtype(DType::F64)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()?)
}

#[test]
fn key_ranges_equal_the_mask_rule() {
    for list in LISTS {
        for (text, height, width) in [(2, 1, 1), (3, 3, 4), (5, 4, 3), (4, 1, 5), (2, 5, 1)] {
            let layout = Layout::new(&spans(list, [text, text + 1, height * width]), Grid { height, width }).unwrap();
            for (pattern, length) in all_patterns().into_iter().flat_map(|p| (1..=text).map(move |l| (p, l))) {
                let keys = layout.keys(pattern, &[length]);
                for query in 0..layout.positions() {
                    let (lists, runs) = (&keys.lists, keys.lists.runs_of(query));
                    let listed = runs.iter().flat_map(|r| (0..r.len).map(move |i| r.start + i * r.stride));
                    let cut = |&key: &usize| {
                        keys.text_lengths.is_none() || !lists.text.contains(&key) || key < lists.text.start + length
                    };
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
    let rows = |list| {
        let layout = Layout::new(&spans(list, [3, 3, 4]), Grid { height: 2, width: 2 }).unwrap();
        let visible = |q, k| u8::from(layout.visible(Pattern::Column, 2, q, k)).to_string();
        let all = 0..layout.positions();
        all.clone().map(|q| all.clone().map(|k| visible(q, k)).collect::<String>()).collect::<Vec<_>>()
    };
    // [CLS] [SEP] [PAD] | start z1 z2 z3
    let generation = ["1100000", "1100000", "1100000", "1101000", "1101100", "1101010", "1101101"];
    assert_eq!(rows(TEXT_TO_IMAGE), generation);
    // z1 z2 z3 z4 | [CLS] token
    assert_eq!(rows(IMAGE_TO_TEXT), ["101000", "010100", "101000", "010100", "111110", "111111"]);
    // z1 z2 z3 z4 [CLS] [SEP] [PAD] | [CLS] token
    let answering = ["101011000", "010111000", "101011000", "010111000"].into_iter();
    let text = ["111111000", "111111000", "111111000", "111111010", "111111011"];
    assert_eq!(rows(VISUAL_QUESTION), answering.chain(text).collect::<Vec<_>>());
}

#[test]
fn block_attention_equals_dense_attention() -> Result<()> {
    for index in 0..40 {
        let mut case = case(index);
        let (generator, params) = case.generator(DType::F64)?;
        let (texts, codes) = (case.texts(), case.codes());
        for list in LISTS {
            let batch = case.batch(list, &texts, &codes)?;
            let (block, dense) = (loss(&generator, &batch)?, dense_loss(&generator, &batch)?);
            assert!(max_difference(&block, &dense)? < 1e-10, "case {index} {list:?}");
            let (block, dense) = (block.backward()?, dense.backward()?);
            for (name, var) in &params {
                match (block.get(var), dense.get(var)) {
                    (Some(block), Some(dense)) => {
                        let bound = 1e-9 * largest(dense)?.max(1e-3);
                        assert!(max_difference(block, dense)? < bound, "case {index} {list:?} {name}");
                    }
                    (block, dense) => assert_eq!(block.is_some(), dense.is_some(), "{name}"),
                }
            }
        }
    }
    Ok(())
}

/// The gradient of every parameter along a random direction, in double precision.
#[test]
fn gradients_equal_finite_differences() -> Result<()> {
    for index in [1, 2, 3, 4] {
        let mut case = case(index);
        case.config.model.qk_norm = index % 2 == 0;
        case.config.model.sandwich_norm = index > 2;
        let (generator, params) = case.generator(DType::F64)?;
        let (texts, codes) = (case.texts(), case.codes());
        let batches = KINDS.map(|list| case.batch(list, &texts, &codes).expect("a valid batch"));
        let [image, text, answer] = &batches;
        let total = || -> Result<Tensor> {
            Ok(((loss(&generator, image)? + loss(&generator, text)?)? + loss(&generator, answer)?)?)
        };
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
fn padding_has_no_effect_and_is_not_predicted() -> Result<()> {
    let mut case = case(3);
    (case.config.text.max_tokens, case.batch) = (6, 1);
    let (generator, _) = case.generator(DType::F32)?;
    let codes = case.codes();
    for (list, predicted) in KINDS.into_iter().zip([codes[0].len(), 2, 2]) {
        let text = |padding| Tokens::pad(&[vec![2, 7, 3]], 6, padding, &Device::Cpu);
        let batch = |padding| -> Result<Batch> {
            let spans = spans(list, [6, 6, codes[0].len()]);
            let codes = Tokens::pad(&codes, codes[0].len(), 0, &Device::Cpu)?;
            let tokens = |span: &Span| if span.modality == Text { text(padding) } else { Ok(codes.clone()) };
            Batch::new(&spans, spans.iter().map(tokens).collect::<Result<_>>()?)
        };
        let (zeros, nines) = (batch(0)?, batch(9)?);
        assert_eq!(max_difference(&loss(&generator, &zeros)?, &loss(&generator, &nines)?)?, 0.0);
        assert_eq!(zeros.targets(), predicted);
    }
    Ok(())
}

#[test]
fn invalid_lists_of_spans_are_refused() -> Result<()> {
    let tokens = |width: usize| Tokens::whole(Tensor::zeros((2, width), DType::U32, &Device::Cpu)?);
    let (text, image) = (|role| Span::text(role, 3), |role| Span::image(role, 4));
    let (source, target) = (Role::Source, Role::Target);
    let good = [image(source), text(source), text(target)];
    assert!(Batch::new(&good, vec![tokens(4)?, tokens(3)?, tokens(3)?]).is_ok());
    let short = Tokens { ids: tokens(3)?.ids, lengths: vec![3, 4] };
    for bad in
        [vec![tokens(4)?, tokens(3)?], vec![tokens(4)?, tokens(3)?, tokens(2)?], vec![tokens(4)?, short, tokens(3)?]]
    {
        assert!(Batch::new(&good, bad).is_err());
    }
    let lists: [&[Span]; 6] = [
        &[],
        &[text(target)],
        &[text(source), text(source)],
        &[text(target), text(source), text(target)],
        &[text(source), text(source), text(target)],
        &[image(source), image(target)],
    ];
    let grid = Grid { height: 2, width: 2 };
    assert!(lists.iter().all(|list| Layout::new(list, grid).is_err()) && Layout::new(&good, grid).is_ok());
    assert!(Layout::new(&good, Grid { height: 3, width: 2 }).is_err());
    assert!(Layout::new(&Span::image_to_text(4, 1), grid).is_err(), "there is nothing to predict");
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
    // The segments share the parameters out without rest or overlap.
    let mut shared: Vec<String> = generator.segments().iter().flat_map(|s| s.params().keys().cloned()).collect();
    shared.sort();
    assert_eq!(shared, expected);
    Ok(())
}
