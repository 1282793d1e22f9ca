//! Compares the tape that `vilg plan` counts with the bytes that blocks allocate as devices compute them: on the CPU in f16,
//! for which there are no kernels of ours.
//!
//! Bytes are counted for the whole process, so the test runs itself again in a separate process.

use crate::counting::{LIVE, PEAK};
use candle_core::{DType, Device, Tensor};
use std::{env, process::Command, sync::atomic::Ordering::Relaxed};
use vilg::{
    config::{Config, Model, Precision},
    error::Result,
    model::{Batch, Generator, Layout, Tokens, device_activations},
    nn::{
        gradients::Gradients,
        params::Scope,
        pattern::{Grid, Pattern},
    },
    ops::tape::Layers,
    runtime::Kernels,
};

const CHILD: &str = "VILG_TEST_TAPE_CHILD";
const LAYERS: Layers = Layers { kernels: Kernels::Stock, stream: 2, factor: 2, weight: 4 };

#[test]
fn a_tape_has_the_bytes_that_a_block_allocates() {
    if env::var_os(CHILD).is_some() {
        return compare().unwrap();
    }
    let mut child = Command::new(env::current_exe().unwrap());
    child.args(["--exact", "tape::a_tape_has_the_bytes_that_a_block_allocates", "--nocapture", "--test-threads=1"]);
    let output = child.env(CHILD, "1").env("RAYON_NUM_THREADS", "1").output().unwrap();
    let [said, complaint] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(output.status.success(), "{said}\n{complaint}");
    println!("{said}");
}

/// Both directions of a model with each pattern.
fn compare() -> Result<()> {
    let samples = 3;
    let mut wrong = Vec::new();
    for (hidden, heads, side, text, norms) in [(64, 2, 12, 16, false), (32, 4, 16, 8, true), (96, 3, 8, 40, false)] {
        let model = Model { layers: 4, hidden, heads, qk_norm: norms, sandwich_norm: norms, ..Model::default() };
        let mut config = Config { model, ..Config::default() };
        config.text.max_tokens = text;
        let model = Generator::new(&Scope::from_seed(1, DType::F32, &Device::Cpu), &config, 40, 48, (side, side))?;
        let zeros = |length| Tensor::zeros((samples, length), DType::U32, &Device::Cpu);
        let (tokens, codes) = (Tokens::whole(zeros(text)?)?, zeros(side * side)?);
        let grid = Grid { height: side, width: side };
        for (batch, layout) in [
            (Batch::text_to_image(tokens.clone(), codes.clone())?, Layout::text_to_image(text, grid)),
            (Batch::image_to_text(codes, tokens)?, Layout::image_to_text(grid, text)),
        ] {
            let chain = model.autograd_chain(Precision::F16, Some(DType::F16));
            let mut x = chain[0].forward(&Tensor::zeros(0, DType::F32, &Device::Cpu)?, &batch)?.0;
            for (layer, segment) in chain.iter().enumerate().skip(1).take(config.model.layers) {
                // Masks are made at the first use.
                let warm = segment.forward(&x, &batch)?;
                drop(warm);
                let before = LIVE.load(Relaxed);
                let (y, saved) = segment.forward(&x, &batch)?;
                let kept = LIVE.load(Relaxed) - before;
                let dy = y.ones_like()?;
                let live = LIVE.load(Relaxed);
                PEAK.store(live, Relaxed);
                segment.backward(&x, &batch, saved, Some(dy), &mut Gradients::default())?;
                let peak = PEAK.load(Relaxed) - live;
                let pattern = Pattern::of_layer(layer, &config.model);
                let tape = device_activations::block(&LAYERS, &config.model, &layout, pattern, samples);
                // A copy of the input belongs to the segment.
                let expected = [tape.kept() + 2 * x.elem_count() as u64, tape.backward_peak()];
                for (what, found, expected) in [("kept", kept, expected[0]), ("backward", peak, expected[1])] {
                    let ratio = found as f64 / expected as f64;
                    println!("hidden {hidden}, {pattern:?}, {} positions: {what} {ratio:.3}", layout.positions());
                    if !(0.97..1.03).contains(&ratio) {
                        wrong.push(format!("{hidden} {pattern:?} {what}: {found} instead of {expected}"));
                    }
                }
                x = y;
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}
