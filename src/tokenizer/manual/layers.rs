//! The layers of the chain with manual gradients: convolution, upsampling, residual block, attention and final norm.

use super::{Kept, Layer};
use crate::{
    error::{Context, Result, bail},
    nn::{
        conv::{Conv2d, Upsample},
        features::{Buffers, Features},
        gradients::Gradients,
    },
    ops::image_attention::{self, Heads},
    tokenizer::vqgan::{AttnBlock, Head, ResnetBlock},
};
use candle_core::{Device, Tensor};

impl Kept {
    pub(super) fn one(x: Features) -> Self {
        Self { features: vec![x], ..Self::default() }
    }

    pub(super) fn take(&mut self) -> Result<Features> {
        self.features.pop().context("a layer saved too few activations")
    }
}

impl Layer for Conv2d {
    fn forward(&self, x: Features, buffers: &Buffers) -> Result<(Features, Kept)> {
        let mut y = buffers.take(self.output(x.shape)?);
        self.run(&x, None, &mut y)?;
        Ok((y, Kept::one(x)))
    }

    fn backward(&self, mut kept: Kept, dy: Features, buffers: &Buffers, gradients: &mut Gradients) -> Result<Features> {
        let mut x = kept.take()?;
        self.gradients(&x, &dy, gradients)?;
        self.input_gradient(&dy, &mut x)?;
        buffers.give(dy);
        Ok(x)
    }
}

impl Layer for Upsample {
    fn forward(&self, x: Features, buffers: &Buffers) -> Result<(Features, Kept)> {
        let [batch, height, width, channels] = x.shape;
        let mut y = buffers.take([batch, 2 * height, 2 * width, channels]);
        self.run(&x, &mut y)?;
        Ok((y, Kept::one(x)))
    }

    fn backward(&self, mut kept: Kept, dy: Features, buffers: &Buffers, gradients: &mut Gradients) -> Result<Features> {
        let mut x = kept.take()?;
        self.gradients(&x, &dy, gradients)?;
        self.input_gradient(&dy, &mut x)?;
        buffers.give(dy);
        Ok(x)
    }
}

impl Head {
    /// The input of its convolution, recomputed from the saved activations.
    pub(super) fn input(&self, kept: &Kept, buffers: &Buffers) -> Result<Tensor> {
        let x = kept.features.last().context("a layer saved too few activations")?;
        let mut a = buffers.take(x.shape);
        self.norm.run(x, &kept.statistics[0], true, &mut a)?;
        Ok(Tensor::from_vec(a.data, a.shape.to_vec(), &Device::Cpu)?)
    }
}

impl Layer for Head {
    fn forward(&self, x: Features, buffers: &Buffers) -> Result<(Features, Kept)> {
        let statistics = self.norm.statistics(&x);
        let mut a = buffers.take(x.shape);
        self.norm.run(&x, &statistics, true, &mut a)?;
        let mut y = buffers.take(self.conv.output(x.shape)?);
        self.conv.run(&a, None, &mut y)?;
        buffers.give(a);
        Ok((y, Kept { features: vec![x], statistics: vec![statistics] }))
    }

    fn backward(&self, mut kept: Kept, dy: Features, buffers: &Buffers, gradients: &mut Gradients) -> Result<Features> {
        let x = kept.take()?;
        let mut a = buffers.take(x.shape);
        self.norm.run(&x, &kept.statistics[0], true, &mut a)?;
        self.conv.gradients(&a, &dy, gradients)?;
        self.conv.input_gradient(&dy, &mut a)?;
        buffers.give(dy);
        self.norm.backward(&x, &kept.statistics[0], true, &mut a, None, gradients)?;
        buffers.give(x);
        Ok(a)
    }
}

impl Layer for ResnetBlock {
    fn forward(&self, x: Features, buffers: &Buffers) -> Result<(Features, Kept)> {
        let first = self.norm1.statistics(&x);
        let mut a = buffers.take(x.shape);
        self.norm1.run(&x, &first, true, &mut a)?;
        let mut h = buffers.take(self.conv1.output(x.shape)?);
        self.conv1.run(&a, None, &mut h)?;
        buffers.give(a);

        let second = self.norm2.statistics(&h);
        let mut a = buffers.take(h.shape);
        self.norm2.run(&h, &second, true, &mut a)?;
        let mut y = buffers.take(h.shape);
        match &self.nin_shortcut {
            None => self.conv2.run(&a, Some(&x), &mut y)?,
            Some(shortcut) => {
                let mut residual = buffers.take(h.shape);
                shortcut.run(&x, None, &mut residual)?;
                self.conv2.run(&a, Some(&residual), &mut y)?;
                buffers.give(residual);
            }
        }
        buffers.give(a);
        Ok((y, Kept { features: vec![x, h], statistics: vec![first, second] }))
    }

    fn backward(&self, mut kept: Kept, dy: Features, buffers: &Buffers, gradients: &mut Gradients) -> Result<Features> {
        let (h, x) = (kept.take()?, kept.take()?);
        let [first, second] = &kept.statistics[..] else { bail!("a residual block saved too few activations") };
        let mut dh = buffers.take(h.shape);
        self.norm2.run(&h, second, true, &mut dh)?;
        self.conv2.gradients(&dh, &dy, gradients)?;
        self.conv2.input_gradient(&dy, &mut dh)?;
        self.norm2.backward(&h, second, true, &mut dh, None, gradients)?;
        buffers.give(h);

        let mut dx = buffers.take(x.shape);
        self.norm1.run(&x, first, true, &mut dx)?;
        self.conv1.gradients(&dx, &dh, gradients)?;
        self.conv1.input_gradient(&dh, &mut dx)?;
        buffers.give(dh);
        let plus = match &self.nin_shortcut {
            None => dy,
            Some(shortcut) => {
                let mut plus = buffers.take(x.shape);
                shortcut.gradients(&x, &dy, gradients)?;
                shortcut.input_gradient(&dy, &mut plus)?;
                buffers.give(dy);
                plus
            }
        };
        self.norm1.backward(&x, first, true, &mut dx, Some(&plus), gradients)?;
        buffers.give(plus);
        buffers.give(x);
        Ok(dx)
    }
}

/// Attention block: the normalized input, queries, keys and values, and the output of attention.
struct Attended {
    normal: Features,
    qkv: [Features; 3],
    y: Features,
}

impl Attended {
    fn heads(&self) -> Heads<'_, f32> {
        heads(&self.qkv)
    }

    fn give(self, buffers: &Buffers) {
        let [q, k, v] = self.qkv;
        [self.normal, q, k, v, self.y].into_iter().for_each(|features| buffers.give(features));
    }
}

fn heads([q, k, v]: &[Features; 3]) -> Heads<'_, f32> {
    let [_, height, width, channels] = q.shape;
    Heads { q: &q.data, k: &k.data, v: &v.data, positions: height * width, channels }
}

impl AttnBlock {
    fn attend(&self, x: &Features, kept: &Kept, buffers: &Buffers) -> Result<Attended> {
        let mut normal = buffers.take(x.shape);
        self.norm.run(x, &kept.statistics[0], false, &mut normal)?;
        let qkv = [(); 3].map(|()| buffers.take(x.shape));
        let mut attended = Attended { normal, qkv, y: buffers.take(x.shape) };
        for (conv, to) in [&self.q, &self.k, &self.v].into_iter().zip(&mut attended.qkv) {
            conv.run(&attended.normal, None, to)?;
        }
        image_attention::forward(heads(&attended.qkv), &mut attended.y.data);
        Ok(attended)
    }
}

impl Layer for AttnBlock {
    fn forward(&self, x: Features, buffers: &Buffers) -> Result<(Features, Kept)> {
        let mut kept = Kept { features: Vec::new(), statistics: vec![self.norm.statistics(&x)] };
        let attended = self.attend(&x, &kept, buffers)?;
        let mut y = buffers.take(x.shape);
        self.proj_out.run(&attended.y, Some(&x), &mut y)?;
        attended.give(buffers);
        kept.features.push(x);
        Ok((y, kept))
    }

    fn backward(&self, mut kept: Kept, dy: Features, buffers: &Buffers, gradients: &mut Gradients) -> Result<Features> {
        let x = kept.take()?;
        let mut attended = self.attend(&x, &kept, buffers)?;
        self.proj_out.gradients(&attended.y, &dy, gradients)?;
        self.proj_out.input_gradient(&dy, &mut attended.y)?;
        let mut d = [(); 3].map(|()| buffers.take(x.shape));
        let slices = d.each_mut().map(|d| d.data.as_mut_slice());
        image_attention::backward(attended.heads(), &attended.y.data, slices);

        let (mut dx, mut part) = (buffers.take(x.shape), buffers.take(x.shape));
        dx.data.fill(0.0);
        for (conv, d) in [&self.q, &self.k, &self.v].into_iter().zip(d) {
            conv.gradients(&attended.normal, &d, gradients)?;
            conv.input_gradient(&d, &mut part)?;
            dx.data.iter_mut().zip(&part.data).for_each(|(sum, part)| *sum += part);
            buffers.give(d);
        }
        self.norm.backward(&x, &kept.statistics[0], false, &mut dx, Some(&dy), gradients)?;
        attended.give(buffers);
        [part, dy, x].into_iter().for_each(|features| buffers.give(features));
        Ok(dx)
    }
}
