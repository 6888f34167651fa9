# gnuplot -c plot_synthetic.gp FOLDER samples.svg '0.015625 0.125 1 8'
# A row for each sample: underscores are left blank, the target is blue, noise orange, what does not belong there black.
set terminal svg size 900,640 background 'white' font 'sans-serif,14' noenhanced butt
set output ARG2
unset tics
set border linecolor rgb '#bbbbbb'
set xrange [-0.5:63.5]
set yrange [7.5:-0.5]
set multiplot layout words(ARG3),2 margins 0.14,0.98,0.03,0.90 spacing 0.02,0.02
budget(kappa) = kappa < 1 ? sprintf('1/%g bit', 1 / kappa) : sprintf(kappa == 1 ? '%g bit' : '%g bits', kappa)
array colours[3] = ['#0072b2', '#e69f00', '#000000']
samples(kappa, name) = sprintf('%s/kappa_%s/%s.dat', ARG1, kappa, name)
do for [kappa in ARG3] {
  do for [name in 'own_latents one_latent'] {
    unset label
    if (name eq 'own_latents') { set label budget(real(kappa)) at graph -0.04,0.5 right }
    unset title
    if (kappa eq word(ARG3, 1)) { set title name eq 'one_latent' ? 'one Z for all samples' : 'a Z of its own for each sample' }
    # Strokes, since an image would be a bitmap, and a box for each character ten times as large.
    plot for [kind = 1:3] samples(kappa, name) matrix using ($3 == kind ? $1 - 0.5 : NaN):2:(1):(0) \
      with vectors nohead linewidth 13 linecolor rgb colours[kind] notitle
  }
}
unset multiplot
