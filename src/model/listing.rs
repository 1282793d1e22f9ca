//! The generator's parameters by formula, segment by segment: what could be sharded, without any of it in memory.

use crate::config::Config;
use std::collections::BTreeMap;

/// The parameters of one segment: their shapes in order of name.
pub type Unit = BTreeMap<String, Vec<usize>>;

/// The segments of a generator over `vocab_size` text tokens and a (height, width) `grid` of `codebook_size` codes:
/// embedding, blocks, head.
pub fn generator(config: &Config, vocab_size: usize, codebook_size: usize, grid: (usize, usize)) -> Vec<Unit> {
    let hidden = config.model.hidden;
    let mut embedding = Unit::from([("image_start".to_owned(), vec![hidden])]);
    let tables = [
        ("text_embedding", vocab_size),
        ("text_position", config.text.max_tokens),
        ("image_embedding", codebook_size),
        ("image_row", grid.0),
        ("image_column", grid.1),
    ];
    embedding.extend(tables.map(|(name, rows)| (format!("{name}.weight"), vec![rows, hidden])));
    let mut head = norm("norm", hidden);
    head.extend(linear("text_head", hidden, vocab_size));
    head.extend(linear("image_head", hidden, codebook_size));
    let blocks = (0..config.model.layers).map(|i| block(config, &format!("blocks.{i}")));
    std::iter::once(embedding).chain(blocks).chain([head]).collect()
}

fn block(config: &Config, name: &str) -> Unit {
    let model = &config.model;
    let (hidden, inner) = (model.hidden, model.hidden * model.mlp_ratio);
    let head = hidden / model.heads.max(1);
    let at = |part: &str| format!("{name}.{part}");
    let mut unit = norm(&at("norm1"), hidden);
    unit.extend(norm(&at("norm2"), hidden));
    unit.extend(linear(&at("attention.qkv"), hidden, 3 * hidden));
    unit.extend(linear(&at("attention.proj"), hidden, hidden));
    unit.extend(linear(&at("mlp.fc1"), hidden, inner));
    unit.extend(linear(&at("mlp.fc2"), inner, hidden));
    if model.qk_norm {
        unit.extend(["attention.q_norm", "attention.k_norm"].into_iter().flat_map(|part| norm(&at(part), head)));
    }
    if model.sandwich_norm {
        unit.extend(["norm1_post", "norm2_post"].into_iter().flat_map(|part| norm(&at(part), hidden)));
    }
    unit
}

fn linear(name: &str, inputs: usize, outputs: usize) -> Unit {
    Unit::from([(format!("{name}.weight"), vec![outputs, inputs]), (format!("{name}.bias"), vec![outputs])])
}

fn norm(name: &str, size: usize) -> Unit {
    Unit::from([(format!("{name}.weight"), vec![size]), (format!("{name}.bias"), vec![size])])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{Generator, size},
        nn::params::Scope,
    };
    use candle_core::{DType, Device};

    #[test]
    fn what_is_listed_is_what_the_segments_hold() {
        for (qk_norm, sandwich_norm) in [(false, false), (true, true)] {
            let mut config = Config::default();
            config.text.max_tokens = 5;
            let model = &mut config.model;
            (model.layers, model.hidden, model.heads, model.mlp_ratio) = (3, 12, 2, 3);
            (model.qk_norm, model.sandwich_norm) = (qk_norm, sandwich_norm);
            let scope = Scope::from_seed(0, DType::F32, &Device::Cpu);
            let model = Generator::new(&scope, &config, 17, 13, (2, 3)).unwrap();
            let held = |params: &crate::nn::params::Params| -> Unit {
                params.iter().map(|(name, var)| (name.clone(), var.dims().to_vec())).collect()
            };
            let held: Vec<Unit> = model.segments().iter().map(|segment| held(segment.params())).collect();
            let listed = generator(&config, 17, 13, (2, 3));
            assert_eq!(listed, held);
            let elements: usize =
                listed.iter().flat_map(Unit::values).map(|shape| shape.iter().product::<usize>()).sum();
            let parts: u64 = size::generator(&config, 17, 13, (2, 3)).iter().map(|(_, count)| count).sum();
            assert_eq!(elements as u64, parts);
        }
    }
}
