# gnuplot -c plot_head.gp results.csv picture.svg
# Time and memory of a step of the head and its loss, forward and backward, 2 threads, float32: bars of eager LibTorch, which
# makes the logits, and of LinearLogits, which does not.
set datafile separator ','
set terminal svg size 1000,420 background 'white' font 'sans-serif,14' noenhanced
set output ARG2

# Okabe and Ito's colours, which differ in lightness, too
eager_colour = '#d55e00'
our_colour = '#0072b2'

set table $machine
plot ARG1 using (strcol('processor').', '.strcol('instruction_set').', LibTorch '.strcol('libtorch')) with table if ($0 == 1)
unset table

is_head(row) = strstrt(row, 'LinearLogits') == 1
is_of(ratio) = is_head(strcol('row')) && strcol('baseline') eq 'linear and F::cross_entropy' && strcol('dtype') eq 'float32' \
               && column('threads') == 2 && strcol('ratio_of') eq ratio
size(row, shape) = shape.'\n'.row[14:*]
tokens(shape) = real(shape[1:strstrt(shape, 'x') - 1])
classes(shape) = real(shape[strstrt(shape, 'x') + 1:*])
mebibytes(ratio) = is_of(ratio) ? column('ratio') * 4 * tokens(strcol('shape')) * classes(strcol('shape')) / 2**20 : 0

set table $seconds separator comma
plot ARG1 using (size(strcol('row'), strcol('shape'))):'baseline_median_s':'ours_median_s' with table if (is_of('baseline / ours'))
set table $our_memory separator comma
plot ARG1 using (mebibytes('extra memory / logits')) with table if (is_of('extra memory / logits'))
set table $eager_memory separator comma
plot ARG1 using (size(strcol('row'), strcol('shape'))):(mebibytes("baseline's extra memory / logits")) with table if (is_of("baseline's extra memory / logits"))
unset table

set boxwidth 0.3
set style fill solid noborder
set grid ytics linecolor '#dddddd'
set border 3
set tics nomirror out
set xtics font ',12'
set xrange [-0.5:1.5]
set logscale y
set key at screen 0.5,0.91 center top horizontal

set multiplot layout 1,2 margins 0.07,0.99,0.15,0.78 spacing 0.09 title 'Head and cross entropy, a step: '.$machine[1].', 2 threads'
set title 'seconds'
set yrange [0.3:40]
plot $seconds using 0:(1/0):xtic(1) with points pointtype 0 notitle, \
     $seconds using ($0 - 0.15):2 with boxes linecolor rgb eager_colour title 'eager LibTorch', \
     $seconds using ($0 + 0.15):3 with boxes linecolor rgb our_colour title 'LinearLogits', \
     $seconds using ($0 - 0.15):2:(sprintf('%.2g', $2)) with labels offset 0,0.6 notitle, \
     $seconds using ($0 + 0.15):3:(sprintf('%.2g', $3)) with labels offset 0,0.6 notitle
set title 'MiB beside the gradients'
unset key
set yrange [5:9000]
plot $eager_memory using 0:(1/0):xtic(1) with points pointtype 0 notitle, \
     $eager_memory using ($0 - 0.15):2 with boxes linecolor rgb eager_colour notitle, \
     $our_memory using ($0 + 0.15):1 with boxes linecolor rgb our_colour notitle, \
     $eager_memory using ($0 - 0.15):2:(sprintf('%.0f', $2)) with labels offset 0,0.6 notitle, \
     $our_memory using ($0 + 0.15):1:(sprintf('%.0f', $1)) with labels offset 0,0.6 notitle
unset multiplot
