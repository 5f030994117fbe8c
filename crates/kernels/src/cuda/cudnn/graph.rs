//! A graph of operations on tensors of four dimensions.

use cudarc::cudnn::sys::{
    cudnnBackendAttributeName_t as Name, cudnnBackendDescriptorType_t as Kind,
    cudnnDataType_t as DataType, cudnnPointwiseMode_t as Mode, cudnnReduceTensorOp_t as Reduction,
};

use super::descriptor::{Descriptor, Object};
use crate::cuda::error::CudaError;

/// What elements are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Number {
    Bf16,
    F32,
    I32,
    I64,
    Bool,
}

impl Number {
    fn cudnn(self) -> DataType {
        match self {
            Self::Bf16 => DataType::CUDNN_DATA_BFLOAT16,
            Self::F32 => DataType::CUDNN_DATA_FLOAT,
            Self::I32 => DataType::CUDNN_DATA_INT32,
            Self::I64 => DataType::CUDNN_DATA_INT64,
            Self::Bool => DataType::CUDNN_DATA_BOOLEAN,
        }
    }
}

/// Sizes, and how far elements lie apart.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) sizes: [i64; 4],
    pub(super) strides: [i64; 4],
}

impl Layout {
    pub(super) fn dense(sizes: [i64; 4]) -> Self {
        let [_, b, c, d] = sizes;
        Self {
            sizes,
            strides: [b * c * d, c * d, d, 1],
        }
    }

    /// The same elements with the last two dimensions exchanged.
    pub(super) fn transposed(mut self) -> Self {
        self.sizes.swap(2, 3);
        self.strides.swap(2, 3);
        self
    }

    /// One element in each row.
    pub(super) fn column(self) -> Self {
        let [a, b, c, _] = self.sizes;
        Self::dense([a, b, c, 1])
    }
}

/// A tensor of a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tensor(usize);

impl Tensor {
    /// What plans call it.
    pub(super) fn id(self) -> i64 {
        self.0 as i64 + 1
    }
}

/// What is computed of elements by themselves.
#[derive(Debug, Clone, Copy)]
pub(super) enum Each {
    Plus,
    Minus,
    Times,
    Over,
    Exp,
    Log,
    Less,
    AtLeast,
    And,
    /// The first where the third is true, else the second.
    Choose,
    /// Where the element is in that dimension.
    Index(i64),
}

impl Each {
    fn mode(self) -> Mode {
        match self {
            Self::Plus => Mode::CUDNN_POINTWISE_ADD,
            Self::Minus => Mode::CUDNN_POINTWISE_SUB,
            Self::Times => Mode::CUDNN_POINTWISE_MUL,
            Self::Over => Mode::CUDNN_POINTWISE_DIV,
            Self::Exp => Mode::CUDNN_POINTWISE_EXP,
            Self::Log => Mode::CUDNN_POINTWISE_LOG,
            Self::Less => Mode::CUDNN_POINTWISE_CMP_LT,
            Self::AtLeast => Mode::CUDNN_POINTWISE_CMP_GE,
            Self::And => Mode::CUDNN_POINTWISE_LOGICAL_AND,
            Self::Choose => Mode::CUDNN_POINTWISE_BINARY_SELECT,
            Self::Index(_) => Mode::CUDNN_POINTWISE_GEN_INDEX,
        }
    }

    /// What it is computed in, and gives.
    fn number(self) -> Number {
        match self {
            Self::Less | Self::AtLeast | Self::And => Number::Bool,
            Self::Index(_) => Number::I32,
            _ => Number::F32,
        }
    }
}

/// What rows are reduced to.
#[derive(Debug, Clone, Copy)]
pub(super) enum Of {
    Sum,
    Max,
}

/// Sizes of a product's matrices that are read when it runs.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sizes {
    pub(super) rows: Option<Tensor>,
    pub(super) columns: Option<Tensor>,
    pub(super) depth: Option<Tensor>,
}

/// What is described so far.
#[derive(Default)]
pub(super) struct Graph {
    tensors: Vec<Descriptor>,
    /// What operations are made of.
    pub(super) parts: Vec<Descriptor>,
    pub(super) operations: Vec<Descriptor>,
    /// By id.
    pub(super) constants: Vec<(i64, f32)>,
}

/// Bytes of which a tensor's address is a multiple.
const ALIGNED_BYTES: i64 = 16;

impl Graph {
    fn add(
        &mut self,
        name: &str,
        number: Number,
        layout: Layout,
        more: impl FnOnce(Descriptor) -> Result<Descriptor, CudaError>,
    ) -> Result<Tensor, CudaError> {
        let tensor = Tensor(self.tensors.len());
        let described =
            Descriptor::new(Kind::CUDNN_BACKEND_TENSOR_DESCRIPTOR, format!("`{name}`"))?
                .with(Name::CUDNN_ATTR_TENSOR_DATA_TYPE, &[number.cudnn()])?
                .with(Name::CUDNN_ATTR_TENSOR_DIMENSIONS, &layout.sizes)?
                .with(Name::CUDNN_ATTR_TENSOR_STRIDES, &layout.strides)?
                .with(Name::CUDNN_ATTR_TENSOR_UNIQUE_ID, &[tensor.id()])?
                .with(Name::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, &[ALIGNED_BYTES])?;
        self.tensors.push(more(described)?.finish()?);
        Ok(tensor)
    }

    /// A tensor whose address is given when the plan runs.
    pub(super) fn outer(
        &mut self,
        name: &str,
        number: Number,
        layout: Layout,
    ) -> Result<Tensor, CudaError> {
        self.add(name, number, layout, Ok)
    }

    /// The same, each of whose first dimension begins so many elements from the address on.
    pub(super) fn ragged(
        &mut self,
        name: &str,
        number: Number,
        layout: Layout,
        offsets: Tensor,
    ) -> Result<Tensor, CudaError> {
        let offsets = [self.object(offsets)];
        self.add(name, number, layout, |tensor| {
            tensor.with(Name::CUDNN_ATTR_TENSOR_RAGGED_OFFSET_DESC, &offsets)
        })
    }

    /// A tensor that no memory has.
    pub(super) fn inner(
        &mut self,
        name: &str,
        number: Number,
        layout: Layout,
    ) -> Result<Tensor, CudaError> {
        self.add(name, number, layout, |tensor| {
            tensor.with(Name::CUDNN_ATTR_TENSOR_IS_VIRTUAL, &[true])
        })
    }

    /// The same, ragged.
    pub(super) fn ragged_inner(
        &mut self,
        name: &str,
        number: Number,
        layout: Layout,
        offsets: Tensor,
    ) -> Result<Tensor, CudaError> {
        let offsets = [self.object(offsets)];
        self.add(name, number, layout, |tensor| {
            tensor
                .with(Name::CUDNN_ATTR_TENSOR_RAGGED_OFFSET_DESC, &offsets)?
                .with(Name::CUDNN_ATTR_TENSOR_IS_VIRTUAL, &[true])
        })
    }

    /// A number that is known when the plan is made.
    pub(super) fn constant(&mut self, name: &str, value: f32) -> Result<Tensor, CudaError> {
        let one = Layout::dense([1; 4]);
        let tensor = self.add(name, Number::F32, one, |tensor| {
            tensor.with(Name::CUDNN_ATTR_TENSOR_IS_BY_VALUE, &[true])
        })?;
        self.constants.push((tensor.id(), value));
        Ok(tensor)
    }

    fn object(&self, tensor: Tensor) -> Object {
        self.tensors[tensor.0].object()
    }

    fn part(&mut self, part: Descriptor) -> Result<Object, CudaError> {
        self.parts.push(part.finish()?);
        Ok(self.parts[self.parts.len() - 1].object())
    }

    /// `out = a · b`, summed in fp32.
    pub(super) fn product(
        &mut self,
        name: &str,
        [a, b, out]: [Tensor; 3],
        sizes: Sizes,
    ) -> Result<(), CudaError> {
        let float = [DataType::CUDNN_DATA_FLOAT];
        let how = Descriptor::new(Kind::CUDNN_BACKEND_MATMUL_DESCRIPTOR, name)?
            .with(Name::CUDNN_ATTR_MATMUL_COMP_TYPE, &float)?;
        let how = self.part(how)?;
        let mut product = Descriptor::new(Kind::CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR, name)?
            .with(Name::CUDNN_ATTR_OPERATION_MATMUL_ADESC, &[self.object(a)])?
            .with(Name::CUDNN_ATTR_OPERATION_MATMUL_BDESC, &[self.object(b)])?
            .with(Name::CUDNN_ATTR_OPERATION_MATMUL_CDESC, &[self.object(out)])?
            .with(Name::CUDNN_ATTR_OPERATION_MATMUL_DESC, &[how])?;
        for (attribute, size) in [
            (
                Name::CUDNN_ATTR_OPERATION_MATMUL_GEMM_M_OVERRIDE_DESC,
                sizes.rows,
            ),
            (
                Name::CUDNN_ATTR_OPERATION_MATMUL_GEMM_N_OVERRIDE_DESC,
                sizes.columns,
            ),
            (
                Name::CUDNN_ATTR_OPERATION_MATMUL_GEMM_K_OVERRIDE_DESC,
                sizes.depth,
            ),
        ] {
            if let Some(size) = size {
                product = product.with(attribute, &[self.object(size)])?;
            }
        }
        self.operations.push(product.finish()?);
        Ok(())
    }

    /// `out`, element by element, of one, two or three tensors; where one has one row or column, of that.
    pub(super) fn each(
        &mut self,
        name: &str,
        each: Each,
        of: &[Tensor],
        out: Tensor,
    ) -> Result<(), CudaError> {
        let mut how = Descriptor::new(Kind::CUDNN_BACKEND_POINTWISE_DESCRIPTOR, name)?
            .with(Name::CUDNN_ATTR_POINTWISE_MODE, &[each.mode()])?
            .with(
                Name::CUDNN_ATTR_POINTWISE_MATH_PREC,
                &[each.number().cudnn()],
            )?;
        if let Each::Index(dimension) = each {
            how = how.with(Name::CUDNN_ATTR_POINTWISE_AXIS, &[dimension])?;
        }
        let how = self.part(how)?;
        let mut operation =
            Descriptor::new(Kind::CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR, name)?
                .with(Name::CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, &[how])?
                .with(
                    Name::CUDNN_ATTR_OPERATION_POINTWISE_YDESC,
                    &[self.object(out)],
                )?;
        let names = [
            Name::CUDNN_ATTR_OPERATION_POINTWISE_XDESC,
            Name::CUDNN_ATTR_OPERATION_POINTWISE_BDESC,
            Name::CUDNN_ATTR_OPERATION_POINTWISE_TDESC,
        ];
        for (attribute, tensor) in names.into_iter().zip(of) {
            operation = operation.with(attribute, &[self.object(*tensor)])?;
        }
        self.operations.push(operation.finish()?);
        Ok(())
    }

    /// The same into a tensor that no memory has.
    pub(super) fn then(
        &mut self,
        name: &str,
        each: Each,
        of: &[Tensor],
        layout: Layout,
    ) -> Result<Tensor, CudaError> {
        let out = self.inner(name, each.number(), layout)?;
        self.each(name, each, of, out)?;
        Ok(out)
    }

    /// Reduces each dimension in which `out` has size 1.
    pub(super) fn reduce(
        &mut self,
        name: &str,
        to: Of,
        from: Tensor,
        out: Tensor,
    ) -> Result<(), CudaError> {
        let operator = match to {
            Of::Sum => Reduction::CUDNN_REDUCE_TENSOR_ADD,
            Of::Max => Reduction::CUDNN_REDUCE_TENSOR_MAX,
        };
        let float = [DataType::CUDNN_DATA_FLOAT];
        let how = Descriptor::new(Kind::CUDNN_BACKEND_REDUCTION_DESCRIPTOR, name)?
            .with(Name::CUDNN_ATTR_REDUCTION_COMP_TYPE, &float)?
            .with(Name::CUDNN_ATTR_REDUCTION_OPERATOR, &[operator])?;
        let how = self.part(how)?;
        let operation = Descriptor::new(Kind::CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR, name)?
            .with(Name::CUDNN_ATTR_OPERATION_REDUCTION_DESC, &[how])?
            .with(
                Name::CUDNN_ATTR_OPERATION_REDUCTION_XDESC,
                &[self.object(from)],
            )?
            .with(
                Name::CUDNN_ATTR_OPERATION_REDUCTION_YDESC,
                &[self.object(out)],
            )?
            .finish()?;
        self.operations.push(operation);
        Ok(())
    }

    /// The same elements in another layout.
    pub(super) fn reshape(
        &mut self,
        name: &str,
        from: Tensor,
        out: Tensor,
    ) -> Result<(), CudaError> {
        let operation = Descriptor::new(Kind::CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR, name)?
            .with(
                Name::CUDNN_ATTR_OPERATION_RESHAPE_XDESC,
                &[self.object(from)],
            )?
            .with(
                Name::CUDNN_ATTR_OPERATION_RESHAPE_YDESC,
                &[self.object(out)],
            )?
            .finish()?;
        self.operations.push(operation);
        Ok(())
    }

    /// All that was made, for whoever keeps it.
    pub(super) fn into_parts(self) -> impl Iterator<Item = Descriptor> {
        self.tensors
            .into_iter()
            .chain(self.parts)
            .chain(self.operations)
    }
}
