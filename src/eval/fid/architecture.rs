//! The architecture of InceptionV3 (arXiv 1512.00567) as data: its blocks of parallel branches.

use Piece::{Average, Down, Fork, Largest, Square, Strip};
use std::fmt;

/// Which network the weights belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weights {
    /// TensorFlow's of 2015, as pytorch-fid publishes it.
    TensorFlow,
    /// torchvision's.
    Torchvision,
}

impl fmt::Display for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TensorFlow => "TensorFlow's InceptionV3 (pytorch-fid's pt_inception-2015-12-05-*.pth)",
            Self::Torchvision => "torchvision's InceptionV3 (inception_v3_google-*.pth)",
        })
    }
}

/// One layer of a branch. Convolutions have their name in the block and their number of output channels.
#[derive(Clone, Copy)]
pub enum Piece {
    /// A square kernel with this side.
    Square(&'static str, usize, usize),
    /// A rectangular kernel with this height and width.
    Strip(&'static str, usize, [usize; 2]),
    /// A 3 × 3 convolution with stride 2.
    Down(&'static str, usize),
    /// A 1 × 3 and a 3 × 1 convolution in parallel, concatenated, with this many channels each.
    Fork([&'static str; 2], usize),
    /// 3 × 3 average pooling.
    Average,
    /// 3 × 3 max pooling with this stride.
    Largest(usize),
}

/// The blocks after the first convolutions.
pub fn mixed(weights: Weights) -> Vec<(&'static str, Vec<Vec<Piece>>)> {
    let a = |pool| {
        vec![
            vec![Square("branch1x1", 64, 1)],
            vec![Square("branch5x5_1", 48, 1), Square("branch5x5_2", 64, 5)],
            vec![Square("branch3x3dbl_1", 64, 1), Square("branch3x3dbl_2", 96, 3), Square("branch3x3dbl_3", 96, 3)],
            vec![Average, Square("branch_pool", pool, 1)],
        ]
    };
    let b = vec![
        vec![Down("branch3x3", 384)],
        vec![Square("branch3x3dbl_1", 64, 1), Square("branch3x3dbl_2", 96, 3), Down("branch3x3dbl_3", 96)],
        vec![Largest(2)],
    ];
    let c = |inner| {
        vec![
            vec![Square("branch1x1", 192, 1)],
            vec![
                Square("branch7x7_1", inner, 1),
                Strip("branch7x7_2", inner, [1, 7]),
                Strip("branch7x7_3", 192, [7, 1]),
            ],
            vec![
                Square("branch7x7dbl_1", inner, 1),
                Strip("branch7x7dbl_2", inner, [7, 1]),
                Strip("branch7x7dbl_3", inner, [1, 7]),
                Strip("branch7x7dbl_4", inner, [7, 1]),
                Strip("branch7x7dbl_5", 192, [1, 7]),
            ],
            vec![Average, Square("branch_pool", 192, 1)],
        ]
    };
    let d = vec![
        vec![Square("branch3x3_1", 192, 1), Down("branch3x3_2", 320)],
        vec![
            Square("branch7x7x3_1", 192, 1),
            Strip("branch7x7x3_2", 192, [1, 7]),
            Strip("branch7x7x3_3", 192, [7, 1]),
            Down("branch7x7x3_4", 192),
        ],
        vec![Largest(2)],
    ];
    let e = |pool| {
        vec![
            vec![Square("branch1x1", 320, 1)],
            vec![Square("branch3x3_1", 384, 1), Fork(["branch3x3_2a", "branch3x3_2b"], 384)],
            vec![
                Square("branch3x3dbl_1", 448, 1),
                Square("branch3x3dbl_2", 384, 3),
                Fork(["branch3x3dbl_3a", "branch3x3dbl_3b"], 384),
            ],
            vec![pool, Square("branch_pool", 192, 1)],
        ]
    };
    vec![
        ("5b", a(32)),
        ("5c", a(64)),
        ("5d", a(64)),
        ("6a", b),
        ("6b", c(128)),
        ("6c", c(160)),
        ("6d", c(160)),
        ("6e", c(192)),
        ("7a", d),
        ("7b", e(Average)),
        ("7c", e(if weights == Weights::TensorFlow { Largest(1) } else { Average })),
    ]
}
